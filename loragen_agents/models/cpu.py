"""What the CPU can do that decides how a model is best run on it."""

import torch


def cpu_computes_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions, which torch then uses."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in older releases
    if capabilities is not None:
        flags = capabilities()
        return any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
