"""A made-up catalogue in the form of WebShop's files, for use without its data."""

import random

COLOURS = ["black", "blue", "green", "grey", "orange", "white"]
KINDS = {  # category -> department, products, attributes, options
    "beauty": (
        "Beauty & Personal Care",
        ["face cream", "hair mask", "lip balm", "body lotion", "shampoo", "nail polish"],
        ["cruelty free", "paraben free", "tea tree", "long lasting", "sensitive skin"],
        {"size": ["50 ml", "100 ml", "250 ml"]},
    ),
    "electronics": (
        "Electronics",
        ["headphones", "phone case", "power bank", "desk lamp", "keyboard", "speaker"],
        ["fast charging", "noise cancelling", "easy to use", "high speed", "hands free"],
        {"color": COLOURS, "style": ["basic", "plus", "pro"]},
    ),
    "fashion": (
        "Clothing, Shoes & Jewelry",
        ["running shoes", "winter jacket", "jeans", "summer dress", "t-shirt", "sandals"],
        ["machine wash", "rubber sole", "slim fit", "quick drying", "elastic waist"],
        {"color": COLOURS, "size": ["small", "medium", "large", "x-large"]},
    ),
    "garden": (
        "Home & Kitchen",
        ["coffee table", "floor rug", "wall clock", "bookshelf", "throw pillow", "table lamp"],
        ["easy assemble", "space saving", "solid wood", "spot clean", "living room"],
        {"color": COLOURS, "size": ["2 x 3 ft", "4 x 6 ft", "5 x 8 ft"]},
    ),
    "grocery": (
        "Grocery & Gourmet Food",
        ["green tea", "trail mix", "dark chocolate", "pasta sauce", "protein bar", "olive oil"],
        ["gluten free", "non gmo", "low sugar", "plant based", "dairy free"],
        {"flavor name": ["plain", "chili", "garlic"], "size": ["6 ounce", "12 ounce"]},
    ),
}
BRANDS = (
    "Alder Bramble Corvo Dunmore Elmira Fennick Garrow Halden Isolde Junip Kestrel Lumen".split()
)


def made_up(products=300, seed=0):
    """(products, instructions) as in WebShop's two files, the same ones for the same seed."""
    rng = random.Random(seed)
    items = []
    instructions = {}
    for number in range(products):
        item, instruction = _product(number, rng)
        items.append(item)
        instructions[item["asin"]] = instruction
    return items, instructions


def _product(number, rng):
    """-> (entry of the products file, entry of the instructions file). The draws are ordered."""
    category = rng.choice(sorted(KINDS))
    department, things, all_traits, options = KINDS[category]
    thing = rng.choice(things)
    traits = rng.sample(all_traits, 3)
    brand = rng.choice(BRANDS)
    low = rng.randint(300, 9000) / 100
    offered = {}
    for option, values in options.items():
        chosen = rng.sample(values, rng.randint(1, len(values)))
        offered[option] = [{"value": value, "image": None} for value in chosen]
    pricing = f"${low}"
    if rng.random() < 0.1:
        pricing += f" to ${low + 10:.2f}"
    item = {
        "asin": f"B{number:09d}",
        "name": f"{brand} {thing.title()} No. {number + 1}, {traits[0].title()}",
        "category": category,
        "query": thing,
        "page": 1,
        "images": [""],
        "product_category": f"{department} \u203a {thing.title()}",
        "average_rating": "",
        "full_description": f"A {thing} that is made for {traits[1]} and {traits[2]}.",
        "small_description": [f"{trait.capitalize()} " for trait in traits],
        "pricing": pricing,
        "customization_options": offered,
    }
    wanted = rng.sample(traits, 2)
    instruction = {
        "attributes": traits,
        "instruction_attributes": wanted,
        "instruction": f"Find me {wanted[0]} {thing} with {wanted[1]}",
    }
    return item, instruction
