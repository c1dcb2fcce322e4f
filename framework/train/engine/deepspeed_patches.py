"""What we change in DeepSpeed itself: each change is a function that says what, why and where seen.

`apply` makes all of them, before the first engine. tests/train/engine/test_deepspeed_patches.py
proves for each that DeepSpeed still needs it and that it still takes hold; a patch that is not
needed any more goes. What we read and call of DeepSpeed's optimizers beyond its public API is
listed in zero_stages.py.
"""

import torch


def apply(device: torch.device) -> None:
    """All patches for an engine on `device`; again is as good as once."""
    answer_for_compatible_ops()
    import_muon_uncompiled()
    print_no_memory_usage()
    if device.type != "cuda":
        mark_no_profiler_ranges()


def answer_for_compatible_ops() -> None:
    """Answer which of DeepSpeed's own kernels work here: none.

    `init_distributed` asks for its shared-memory collectives. DeepSpeed would run compilers for an
    answer, and then compile a kernel for inference that training never calls: 45 s on a CPU.
    Nothing else that we use asks. Seen in 0.19.8.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


def import_muon_uncompiled() -> None:
    """Import the optimizer Muon without compiling it.

    DeepSpeed imports it only to ask whether an optimizer is one. Its module compiles three
    functions at import, which brings Inductor: 3 s of a core. Muon itself then runs as it is
    written. Seen in 0.19.8.
    """
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda: lambda kernel: kernel
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - for what it leaves behind
    finally:
        compiler.compile = compiled


def print_no_memory_usage() -> None:
    """Keep the optimizer of stage 1 in bf16 from measuring and logging memory at each build.

    It asks for that with `force=True`, so that no setting stops it. Seen in 0.19.8.
    """
    import deepspeed.runtime.bf16_optimizer

    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None


def mark_no_profiler_ranges() -> None:
    """Mark no ranges for a GPU's profiler, where there is no GPU.

    They are 1,500 a step: 5 % of the step of a small model on a CPU. Seen in 0.19.8.
    """
    import deepspeed.utils.nvtx

    deepspeed.utils.nvtx.enable_nvtx = False
