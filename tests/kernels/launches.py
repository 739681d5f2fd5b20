"""What a GPU would be told to do, counted where there is none.

Every operation below autograd counts as one kernel, but for those that give out memory or look at
it in another way.
"""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "expand", "lift"),
    *("t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "split"),
    *("split_with_sizes", "unbind", "narrow", "diagonal", "lift_fresh", "_local_scalar_dense"),
}
"""Operations that launch nothing."""


class Launches(TorchDispatchMode):
    """Counts the kernels of what runs inside, by name; one over a list of tensors is one."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in NOTHING:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self):
        """How many there were."""
        return self.names.total()
