"""What a run shows in the terminal: one bar each for cloning, playing and training.

Bars are on stderr and only there where it is a terminal; text is printed above them. Where output
is no terminal, each iteration is a line. Only the main process shows anything.
"""

import sys
import time

from tqdm import tqdm

from support.distributed import say
from support.metrics import collapse_warning, format_episode, format_iteration

LAYOUT = "{desc:<10} {bar:16} {n_fmt}/{total_fmt}  {elapsed}, {remaining} left{postfix}"


def make_bar(total, title, *, shown=True, first=0, stays=False):
    """A tqdm bar in the common layout. stays: whether it is left on the screen at the end."""
    return tqdm(
        total=total,
        initial=first,
        desc=title,
        bar_format=LAYOUT,
        leave=stays,
        dynamic_ncols=True,
        disable=None if shown else True,  # None: where there is no terminal
    )


def training_bar(first, config, accelerator):
    """The bar of a run's iterations, of which `first` are done."""
    shown = accelerator.is_main_process
    return make_bar(config.iterations, config.method, shown=shown, first=first, stays=True)


def tell_iteration(bar, run, lines, episodes, advantages):
    """The last of `lines` (metrics) in the bar, or as a line; a warning; now and then an episode.

    run: train.Run; advantages: TokenAdvantages of `episodes`.
    """
    config, accelerator = run.config, run.accelerator
    iteration = lines[-1]["iteration"]
    shown = format_iteration(lines[-1])
    bar.set_postfix_str(shown, refresh=False)
    bar.update()
    if bar.disable or not sys.stdout.isatty():
        say(accelerator, f"iteration {iteration + 1}/{config.iterations}: {shown}")
    hierarchical = config.method == "hiper" and config.segments == "learned"
    warning = collapse_warning(lines, hierarchical)
    if warning:
        say(accelerator, f"warning: {warning}")
    if iteration % config.save_every == 0:
        first_row = {name: values[0] for name, values in advantages.raw.items()}
        say(accelerator, format_episode(episodes[0], first_row))
    if iteration + 1 == config.iterations:
        bar.close()


class Playing:
    """The bar of `tasks` that are played: `collect` calls it with each Episode as it ends.

    then: also called with each Episode. The bar goes when all tasks are done.
    """

    def __init__(self, accelerator, tasks, title, then=None):
        self.bar = make_bar(len(tasks), title, shown=accelerator.is_main_process)
        self.then = then
        self.start = time.perf_counter()
        self.ended = self.won = self.turns = self.switches = 0

    def __call__(self, episode):
        if self.then:
            self.then(episode)
        self.ended += 1
        self.won += episode.success
        self.turns += len(episode.turns)
        self.switches += sum(turn.is_segment_start for turn in episode.turns) - 1
        numbers = {
            "success": self.won / self.ended,
            "switches_per_episode": self.switches / self.ended,
            "turns_per_second": self.turns / (time.perf_counter() - self.start),
        }
        self.bar.set_postfix_str(format_iteration(numbers), refresh=False)
        self.bar.update()
        if self.ended == self.bar.total:
            self.bar.close()
