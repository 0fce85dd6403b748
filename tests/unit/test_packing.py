"""Rows that share a prefix run packed behind it, and give what each gives alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loragen_agents.training.packing import batches
from tests.tiny_models import tiny_model

PREFIX = [3 + n % 50 for n in range(70)]
ROWS = [[*PREFIX, *own] for own in ([5, 6, 7], [8], [9, 4, 3, 2, 1], [6])]


@pytest.mark.parametrize("max_tokens", [1000, 74, 1])
def test_a_packed_row_sees_the_prefix_and_itself_alone(max_tokens):
    model, seen = tiny_model(), []
    for batch in batches(ROWS, max_tokens):
        hidden = model.base_model(
            input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask
        ).last_hidden_state
        for row, index in enumerate(batch.rows):
            seen.append(index)
            alone = model.base_model(input_ids=torch.tensor([ROWS[index]])).last_hidden_state[0]
            located = batch.locate(row, torch.arange(len(ROWS[index])))
            torch.testing.assert_close(hidden[located], alone, atol=1e-5, rtol=1e-4)
    assert sorted(seen) == [0, 1, 2, 3]


def test_a_long_prefix_runs_once_for_all_and_a_short_one_for_each():
    (packed,) = batches(ROWS, 1000)
    assert packed.ids.shape == (1, 70 + 10)
    assert sum(batch.ids.numel() for batch in batches(ROWS, 1000, share=False)) == 4 * 75
    assert all(batch.mask is None for batch in batches([row[40:] for row in ROWS], 1000))


@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), min_size=1, max_size=8),
    shared=st.integers(0, 100),
    max_tokens=st.integers(1, 300),
)
def test_every_token_of_every_row_is_in_one_batch(rows, shared, max_tokens):
    whole = [[*range(100, 100 + shared), *row] for row in rows]
    found = {}
    for batch in batches(whole, max_tokens):
        assert len(batch.rows) == 1 or batch.ids.numel() <= max_tokens
        for row, index in enumerate(batch.rows):
            found[index] = batch.ids[batch.locate(row, torch.arange(len(whole[index])))].tolist()
    assert [found[index] for index in range(len(whole))] == whole
