"""Randomness as a function of (seed, purpose, indices): the same draw wherever and whenever it is asked for.

A resumed run equals an uninterrupted one because step 1000 draws from `generator(seed, "train", 1000)` and from
nothing that a restart could lose.
"""

import hashlib

import torch


def generator(seed: int, purpose: str, *indices: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose state depends on its arguments alone (64 bits of BLAKE2b of them)."""
    text = "/".join([str(seed), purpose, *map(str, indices)]).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


def seed_global(source: torch.Generator, rank: int = 0) -> None:
    """Seed the global generators as `source` is: for what a user's network draws of them (dropout), in each process its own.

    torch.manual_seed would do, but takes the stack apart three times where there is no GPU.
    """
    seed = source.initial_seed() + rank
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def normal(shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal draws of the given shape, on the generator's device."""
    return torch.randn(shape, generator=source, device=source.device, dtype=dtype)


def uniform(shape: tuple[int, ...], source: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform draws on [0, 1) of the given shape, on the generator's device."""
    return torch.rand(shape, generator=source, device=source.device, dtype=dtype)
