"""What each token id of a tokenizer stands for, in bytes.

Decoding and encoding again changes the ids of about half of all sampled responses, so text and
spans are read from the sampled ids through this table. Bytes, because a token may hold a part of
a character; the tags are ASCII, and no part of a longer character looks like ASCII.
"""

import re
import weakref

import torch

_tables = weakref.WeakKeyDictionary()  # tokenizer -> TokenTable


class TokenTable:
    """pieces: list of V + 1 bytes objects; lengths: int [V + 1], their lengths.

    The last entry is empty. It stands for ids beyond the tokenizer's vocabulary: the embedding
    of a Qwen2.5 model has a few hundred more rows than its tokenizer has tokens.
    """

    def __init__(self, tokenizer):
        self.size = len(tokenizer)
        self.pieces = [*_pieces(tokenizer), b""]
        self.lengths = torch.tensor([len(piece) for piece in self.pieces])

    def __getitem__(self, token_id):
        return self.pieces[min(token_id, len(self.pieces) - 1)]

    def join(self, token_ids):
        """The bytes of a list of ids."""
        return b"".join([self[token_id] for token_id in token_ids])


def token_bytes(tokenizer):
    """The tokenizer's TokenTable, made once and again when tokens were added."""
    table = _tables.get(tokenizer)
    if table is None or table.size != len(tokenizer):
        table = TokenTable(tokenizer)
        _tables[tokenizer] = table
    return table


def response_text(ids, tokenizer):
    """The text of a list of generated ids."""
    return token_bytes(tokenizer).join(ids).decode("utf-8", "replace")


def _pieces(tokenizer):
    """The bytes of each id of the vocabulary; empty where an id has no token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = str(getattr(backend, "decoder", None))
    byte_of = _byte_level_alphabet()
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    vocab = tokenizer.get_vocab()
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in added:  # a special token is its own text
            pieces[i] = added[i].encode()
        elif "ByteLevel" in decoder:  # GPT-2, Qwen, Llama 3, SmolLM2
            pieces[i] = bytes(byte_of[character] for character in token)
        elif decoder == "None":  # word level: decode joins with spaces
            pieces[i] = f" {token}".encode()
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # sentencepiece's byte fallback
            pieces[i] = bytes([int(token[3:5], 16)])
        else:  # sentencepiece writes a space as U+2581
            pieces[i] = token.replace("\u2581", " ").encode()
    return pieces


def _byte_level_alphabet():
    """Byte-level BPE's character -> byte: printable bytes as themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet
