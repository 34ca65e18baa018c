"""Matmuls of weights in groups: for each type of GGUF files and each ISA variant, the sums are those of the dequantized
weights and the quantized rows, and a row's bits do not depend on the other rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine.runners.native import gguf_blocks, structures
from engine.runners.native.grouped_weights import is_supported, pack_groups
from engine.runners.native.quantized import PADDING, Quantized, Stack
from engine.runners.native.structures import POINTER, GroupedBlock, WeightForm
from tritonlm.contract.gguf_tensors import BLOCKS

from .isa_variants import KERNEL_VARIANTS, library_of

OUTPUTS, INPUTS = 40, 768
# One row, some that unpack codes in registers, and more than fit one pass, a tile or two.
COUNTS = (1, 2, 3, 5, 13, 20, 37)


def stored(kind: str, outputs: int = OUTPUTS, inputs: int = INPUTS) -> Quantized:
    """Random codes with scales of about 0.01."""
    block, size = BLOCKS[kind]
    generator = np.random.default_rng(3)
    raw = generator.integers(0, 256, (outputs, inputs // block, size), dtype=np.uint8)
    scales = generator.uniform(0.005, 0.02, (outputs, inputs // block, 2)).astype(np.float16).view(np.uint8)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}.get(kind, (0,)):
        raw[..., place : place + 2] = scales[..., :2]
    if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        raw[..., 2:4] = scales[..., 2:]
    if kind == "MXFP4":
        raw[..., 0] = generator.integers(115, 125, raw.shape[:2])
    return gguf_blocks.quantized(raw.reshape(outputs, -1), kind)


class Matmul:
    """The kernels' matmul of the logits, and nothing else."""

    def __init__(self, matrix: Quantized | Stack, variant: str) -> None:
        self._library = library_of(variant)
        parts = matrix.parts if isinstance(matrix, Stack) else (matrix,)
        self._packed = [pack_groups(part, self._library) for part in parts]
        blocks = [block for part in self._packed for block in part.blocks()]
        self._blocks = (GroupedBlock * len(blocks))(*blocks)
        factors = torch.cat([part.factors for part in self._packed])
        self._outputs, inputs = len(factors), parts[0].shape[1]
        weights = structures.Weights(
            ctypes.addressof(self._blocks), factors.data_ptr(), inputs=inputs, outputs=len(factors),
            form=WeightForm.GROUPED,
        )  # fmt: skip
        self._held = factors
        self._program = structures.Program(
            hidden_size=inputs, num_heads=1, heads_per_kv=1, head_dim=16, vocab_size=len(factors), lm_head=weights,
            logits_scale=1.0,
        )  # fmt: skip
        self._library.open_model.restype = POINTER
        self._library.open_model.argtypes = [POINTER, *[ctypes.c_int] * 3]
        self._library.project_rows.argtypes = [POINTER, POINTER]
        self._library.close_model.argtypes = [POINTER]
        self._handle = self._library.open_model(ctypes.byref(self._program), 0, 0, 2)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        outputs, count = torch.empty(len(rows), self._outputs), ctypes.c_uint64()
        numbers = np.arange(len(rows), dtype=np.int32)
        arguments = structures.Project(
            len(rows), self._outputs, rows.data_ptr(), numbers.ctypes.data, outputs.data_ptr(), None,
            ctypes.addressof(count),
        )  # fmt: skip
        self._library.project_rows(self._handle, ctypes.byref(arguments))
        return outputs

    def close(self) -> None:
        self._library.close_model(self._handle)


def activations(rows: int, inputs: int = INPUTS) -> torch.Tensor:
    numbers = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(5))
    # Groups with remainders: in all rows, and in some of those that are multiplied together.
    numbers[:, 7] *= 40
    numbers[1::3, -9] *= 60
    numbers[:, 64:96] = 2.5
    return numbers.abs_() if rows == 1 else numbers


def quantized_rows(rows: torch.Tensor) -> torch.Tensor:
    """As grouped_rows.hpp has them, in float64."""
    groups = rows.view(len(rows), -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 254
    numbers = ((groups - low) * (1 / scale).nan_to_num(posinf=0)).round().double() * scale + low
    # What is left of the groups with most of a row's error.
    has_remainder = scale**2 > 6 * (scale**2).mean(1, keepdim=True)
    fine = scale.double() / 254
    remainder = ((groups - numbers) / fine).nan_to_num().round() * fine
    return (numbers + remainder * has_remainder).view_as(rows)


@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
@pytest.mark.parametrize("kind", sorted(gguf_blocks.TYPES))
def test_sums_are_those_of_the_dequantized_weights(kind: str, variant: str) -> None:
    matrix = stored(kind)
    multiply, rows = Matmul(matrix, variant), activations(max(COUNTS))
    weights = matrix.dequantized().double()
    results = multiply(rows)[:, :OUTPUTS]
    expected = quantized_rows(rows) @ weights.T
    # A number halfway between two codes may round differently.
    assert ((results - expected).abs() / expected.std()).max() < 2e-3
    assert ((results - rows.double() @ weights.T).abs() / expected.std()).max() < 0.1
    for count in COUNTS:
        assert torch.equal(multiply(rows[-count:])[:, :OUTPUTS], results[-count:])
    multiply.close()


EXTREMES = [
    (2, 16, 0),
    (3, 16, None),
    (3, 16, 0),
    (3, 32, None),
    (4, 32, None),
    (4, 32, 0),
    (5, 32, None),
    (5, 32, 0),
    (6, 16, None),
    (8, 32, None),
]


@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
def test_sums_of_the_largest_codes_and_numbers_do_not_overflow(variant: str) -> None:
    # All numbers of a group but one are the largest byte.
    rows = torch.ones(13, INPUTS)
    rows[:, ::32] = -1
    for bits, group, lowest in EXTREMES:
        least = -(2 ** (bits - 1)) if lowest is None else lowest
        codes = torch.full((32, INPUTS), least, dtype=torch.int8)
        codes[1::2] = least + 2**bits - 1
        scales = torch.full((32, INPUTS // group), 0.01)
        matrix = Quantized(codes, scales, scales if lowest == 0 else None, bits, lowest)
        multiply, expected = Matmul(matrix, variant), rows.double() @ matrix.dequantized().double().T
        for count in (1, 4, 8, 13):
            torch.testing.assert_close(multiply(rows[:count]).double(), expected[:count], rtol=1e-3, atol=1e-3)
        multiply.close()


@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
def test_passes_of_more_inputs_than_they_share_scales_of(variant: str) -> None:
    matrix = stored("Q4_K", 16, 129 * 256)
    multiply, rows = Matmul(matrix, variant), activations(27, 129 * 256)
    results, expected = multiply(rows)[:, :16], quantized_rows(rows) @ matrix.dequantized().double().T
    assert ((results - expected).abs() / expected.std()).max() < 2e-3
    assert torch.equal(multiply(rows[5:6])[:, :16], results[5:6])
    multiply.close()


def test_six_bits_are_multiplied_if_they_are_around_zero() -> None:
    matrix = Quantized(torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, 2), None, 6)
    assert is_supported(matrix)
    assert not is_supported(replace(matrix, lowest=0))


@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
def test_a_group_with_an_outlier_adds_no_more_error_than_others(variant: str) -> None:
    matrix = stored("Q4_0")
    multiply, rows = Matmul(matrix, variant), activations(21).abs_()
    plain = rows.clone()
    plain[:, 7] /= 40
    plain[1::3, -9] /= 60
    weights = matrix.dequantized().double()
    errors = [(multiply(each)[:, :OUTPUTS] - each.double() @ weights.T).std() for each in (rows, plain)]
    assert errors[0] < 1.25 * errors[1]
    multiply.close()


@pytest.mark.parametrize("kind", sorted(gguf_blocks.TYPES))
def test_packed_weights_take_at_most_a_tenth_more_than_in_the_file(kind: str) -> None:
    block, size = BLOCKS[kind]
    packed = pack_groups(stored(kind, 48, 768), library_of("all"))
    assert packed.data.nbytes <= 1.1 * 48 * 768 // block * size


@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
def test_matrices_of_two_forms_are_multiplied_together(variant: str) -> None:
    stack = Stack((stored("Q4_K", 48), stored("Q6_K", 16), stored("Q8_0", 32)))
    multiply, rows = Matmul(stack, variant), activations(21)
    results, expected = multiply(rows), quantized_rows(rows) @ stack.dequantized().double().T
    assert ((results - expected).abs() / expected.std()).max() < 2e-3
    assert torch.equal(multiply(rows[5:6]), results[5:6])
    multiply.close()


@pytest.mark.parametrize("variant", KERNEL_VARIANTS)
@pytest.mark.parametrize(
    ("bits", "group", "inputs"),
    [(4, 32, 32), (4, 128, 384), (8, 96, 96), (8, 16, 48), (4, 96, 96), (3, 16, 64), (3, 32, 64), (6, 16, 64)],
)
def test_groups_of_any_size_are_multiplied(bits: int, group: int, inputs: int, variant: str) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, inputs), generator=generator, dtype=torch.int8)
    scales = torch.rand(24, inputs // group, generator=generator).half().float() * 1e-30
    matrix = Quantized(codes, scales, -scales, bits)
    # The width of a row is a multiple of 32.
    padded = matrix.padded(24, inputs + -inputs % 32)
    multiply = Matmul(padded or matrix, variant)
    rows = activations(6, padded.shape[1]) if padded else activations(6, inputs)
    expected = quantized_rows(rows) @ (padded or matrix).dequantized().double().T
    assert ((multiply(rows)[:, :24] - expected).abs() / expected.std()).max() < 2e-3
    multiply.close()


def test_rows_that_are_not_numbers_are_not_numbers() -> None:
    multiply, rows = Matmul(stored("Q4_0"), "all"), activations(7)
    clean = multiply(rows)
    rows[3, 100] = float("nan")
    results = multiply(rows)
    assert results[3].isnan().all()
    assert torch.equal(results[:3], clean[:3])
    multiply.close()


def test_rows_are_taken_and_padded_within_each_matrix() -> None:
    first, second = stored("Q4_1", 16), stored("Q8_0", 32)
    stack, numbers = Stack((first, second)), Stack((first, second)).dequantized()
    index = [*range(12, 4, -1), *[PADDING] * 8, *range(16, 48)]
    taken: Any = stack.rows(index)
    assert [part.bits for part in taken.parts] == [4, 8]
    zeros = torch.cat([numbers, torch.zeros(1, INPUTS)])
    assert torch.equal(taken.dequantized(), zeros[[48 if i == PADDING else i for i in index]])
    # Sixteen rows of both matrices have no common form.
    assert stack.rows(range(8, 40)) is None
