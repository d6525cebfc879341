"""Starts hfscratch with PyTorch's FSDP2 on a CPU: `accelerate launch … tests/fsdp_on_cpu.py VERB RECIPE`.

accelerate shards on GPUs alone, and makes FSDP plain DDP on a CPU without a word, which hfscratch refuses. Here
accelerate is told that its processes on the CPU may be sharded: what runs then is torch's own FSDP2 over gloo, and
transformers' and accelerate's own code for its checkpoints.
"""

from accelerate import state
from accelerate.utils import DistributedType

from hfscratch.training import engines

original = state.AcceleratorState.__init__


def initialise(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


state.AcceleratorState.__init__ = initialise
engines.require_launch = lambda **_: None

if __name__ == "__main__":
    import hfscratch.__main__  # noqa: F401
