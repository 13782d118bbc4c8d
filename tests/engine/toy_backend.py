"""A backend that is not gputune's: it trains one member after another and counts its epochs."""

from gputune.engine.backends.base import Backend, Refusal
from gputune.modules.looped import LoopChunk, LoopedModule


class ToyChunk(LoopChunk):
    """Members that train in a plain loop, which is counted."""

    n_epochs = 0

    def advance(self, epoch):
        ToyChunk.n_epochs += 1
        super().advance(epoch)


class Toy(Backend):
    name = "toy"
    noun = "the toy"
    in_words = "in the toy"
    slower = "recorded"
    module_class = LoopedModule

    def refuses(self, work):
        if work.config["optimizer"] == "lion":
            return Refusal("the toy does not support the optimizer 'lion'", "recorded")
        return None

    def make_chunk(self, network, validation, pool, *, seed, horizon):
        return ToyChunk(network, validation, seed=seed, horizon=horizon)


TOY = Toy()
