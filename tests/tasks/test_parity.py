"""Sparse parity: the data against an independent formula, the network's files, and the planted teacher."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from tutelage.tasks.parity import (
    ParityData,
    ParityMLP,
    ParityMLPConfig,
    ReplicatedLinear,
    check_parity,
    planted_teacher,
)

CHUNK = 4096  # examples that the data set makes at a time


@pytest.mark.parametrize(
    ("d", "k", "support"), [(10, 3, (7, 0, 4)), (10, 4, None), (9, 9, None), (5, 1, (2,)), (1, 1, None)]
)
def test_label_is_the_product_of_the_signs_on_the_support(d: int, k: int, support: tuple[int, ...] | None) -> None:
    ids, labels = ParityData(d, k, 1000, seed=3, support=support).arrays()
    assert ids.shape == (1000, d) and labels.shape == (1000,)
    assert set(ids.unique().tolist()) == set(labels.unique().tolist()) == {0, 1}
    signs = np.where(ids.numpy() == 1, 1, -1)
    product = np.prod(signs[:, list(support or range(k))], axis=1)
    assert np.array_equal(labels.numpy(), (product + 1) // 2)


def test_bits_are_fair_and_independent() -> None:
    ids, labels = ParityData(8, 3, 20_000, seed=0).arrays()
    signs = torch.cat([ids * 2 - 1, labels[:, None] * 2 - 1], dim=1).float()
    correlation = signs.T @ signs / len(signs)
    assert (signs.mean(0).abs() < 4 / 20_000**0.5).all()  # four deviations
    assert ((correlation - torch.eye(9)).abs() < 4 / 20_000**0.5).all()


def test_sparse_inputs_fade_out() -> None:
    count, until = 3 * CHUNK, 2 * CHUNK
    data, plain = (ParityData(100, 4, count, seed=2, sparse_until=n) for n in (until, 0))
    ids, labels = data.arrays()
    sparse = ids.float().mean(1) > 0.75  # of a hundred fair bits, more are 1 once in ten million
    assert ids[sparse].float().mean().item() == pytest.approx(0.9, abs=0.005)
    assert sparse[:1000].float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert sparse[CHUNK - 500 : CHUNK + 500].float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert torch.equal(ids[until:], plain.arrays()[0][until:])
    signs = torch.where(ids[:, :4] == 1, 1, -1)
    assert torch.equal(labels, (signs.prod(1) + 1) // 2)


def test_rows_are_those_of_arrays_on_both_sides_of_a_chunk() -> None:
    data = ParityData(6, 2, CHUNK + 5, seed=1)
    ids, labels = data.arrays()
    assert len(data) == len(ids) == len(labels) == CHUNK + 5
    for index in (0, CHUNK - 1, CHUNK, CHUNK + 4, 17):  # back and forth
        assert torch.equal(data[index]["input_ids"], ids[index])
        assert torch.equal(data[index]["labels"], labels[index])
    assert not torch.equal(ids[:5], ids[CHUNK:])


def test_an_example_depends_on_seed_and_index_alone() -> None:
    short, long = ParityData(12, 4, 10, seed=5), ParityData(12, 4, 2 * CHUNK, seed=5)
    other = ParityData(12, 4, 10, seed=6)
    assert torch.equal(short.arrays()[0], long.arrays()[0][:10])
    assert torch.equal(long[CHUNK]["input_ids"], ParityData(12, 4, 2 * CHUNK, seed=5)[CHUNK]["input_ids"])
    assert not torch.equal(short.arrays()[0], other.arrays()[0])


def test_replicas_streams_are_the_single_ones() -> None:
    count, seeds = CHUNK + 3, (4, 0, 1_000_000_007)
    together = ParityData(7, 3, count, seeds, support=(6, 1, 2))
    ids, labels = together.arrays()
    assert ids.shape == (count, 3, 7) and labels.shape == (count, 3)
    for replica, seed in enumerate(seeds):
        alone = ParityData(7, 3, count, seed, support=(6, 1, 2)).arrays()
        assert torch.equal(ids[:, replica], alone[0])
        assert torch.equal(labels[:, replica], alone[1])
    row = together[CHUNK + 1]
    assert torch.equal(row["input_ids"], ids[CHUNK + 1]) and torch.equal(row["labels"], labels[CHUNK + 1])
    one = ParityData(7, 3, 2, (4,))[0]
    assert one["input_ids"].shape == (1, 7) and one["labels"].shape == (1,)


def test_data_can_be_sent_to_workers() -> None:
    data = ParityData(6, 2, 50, seed=(1, 2))
    data[3]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[49]["input_ids"], data[49]["input_ids"])
    assert torch.equal(copy.arrays()[1], data.arrays()[1])


def test_iteration_ends() -> None:
    data = ParityData(6, 2, 3, seed=1)
    assert len(list(data)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"example {index} of 3"):
            data[index]


def test_support_is_the_first_coordinates_unless_given() -> None:
    assert check_parity(5, 3) == (0, 1, 2)
    assert check_parity(5, 3, [4, 0, 2]) == (4, 0, 2)
    assert check_parity(3, 3) == (0, 1, 2)
    assert check_parity(1, 1) == (0,)


@pytest.mark.parametrize(
    ("d", "k", "support", "message"),
    [
        (0, 1, None, "a parity needs at least one bit, got d=0"),
        (8, 0, None, r"k from 1 to d=8 support coordinates, got k=0 \(with k=0 the label is constant\)"),
        (8, 9, None, "k from 1 to d=8 support coordinates, got k=9$"),
        (8, -1, None, "got k=-1$"),
        (8, 3, (0, 1), r"the support \[0, 1\] is not k=3 different coordinates"),
        (8, 3, (0, 1, 1), r"the support \[0, 1, 1\] is not k=3 different coordinates"),
        (8, 3, (0, 1, 8), r"the support \[0, 1, 8\] is out of range: coordinates are 0 to 7"),
        (8, 3, (0, -1, 2), r"the support \[0, -1, 2\] is out of range"),
    ],
)
def test_impossible_parities_are_refused(d: int, k: int, support: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parity(d, k, support)
    with pytest.raises(ValueError, match=message):
        ParityData(d, k, 10, support=support)


def test_network_is_the_formula() -> None:
    model = ParityMLP(ParityMLPConfig(d=6, hidden_size=9))
    ids = ParityData(6, 2, 20).arrays()[0]
    signs = torch.where(ids == 1, 1.0, -1.0)
    first, head = model.blocks[0], model.head
    expected = F.relu(signs @ first.weight.T + first.bias) @ head.weight.T + head.bias
    torch.testing.assert_close(model(ids), expected)


def test_replicated_network_is_its_networks_side_by_side() -> None:
    ids = ParityData(6, 2, 20, (3, 8, 5)).arrays()[0]
    together = ParityMLP(ParityMLPConfig(6, 9, replica_seeds=(3, 8, 5)))
    logits = together(ids)
    assert logits.shape == (20, 3, 2)
    for replica, seed in enumerate((3, 8, 5)):
        alone = ParityMLP(ParityMLPConfig(6, 9, replica_seeds=[seed]))
        torch.testing.assert_close(logits[:, replica], alone(ids[:, replica : replica + 1])[:, 0])
        weight, bias = together.blocks[0].weight[replica], together.blocks[0].bias[replica]
        hidden = F.relu((ids[:, replica] * 2.0 - 1) @ weight + bias)
        expected = hidden @ together.head.weight[replica] + together.head.bias[replica]
        torch.testing.assert_close(logits[:, replica], expected)


def test_replicas_start_from_their_seed_alone_and_within_torchs_bounds() -> None:
    torch.manual_seed(1)
    layer = ReplicatedLinear((0, 1, 2), 16, 300, 0)
    torch.manual_seed(2)
    again, other = ReplicatedLinear((2, 0), 16, 300, 0), ReplicatedLinear((0,), 16, 300, 1)
    assert torch.equal(layer.weight[[2, 0]], again.weight) and torch.equal(layer.bias[[2, 0]], again.bias)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert not torch.equal(layer.weight[0], other.weight[0])
    for values in (layer.weight, layer.bias):
        assert values.abs().max() <= 0.25  # 1 / sqrt(16), as nn.Linear
    assert layer.weight.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("seeds", [None, (3, 7)])
def test_network_is_stored_in_hugging_face_format(tmp_path: Path, seeds: tuple[int, ...] | None) -> None:
    model = ParityMLP(ParityMLPConfig(d=6, hidden_size=9, replica_seeds=seeds))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # as trained, other than the initial weights
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    ids = ParityData(6, 2, 5, 0 if seeds is None else seeds).arrays()[0]
    for loaded in (ParityMLP.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, ParityMLP)
        assert (loaded.config.d, loaded.config.hidden_size) == (6, 9)
        assert loaded.config.replica_seeds == (None if seeds is None else [3, 7])
        assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize(
    ("d", "k", "support", "width"),
    [(12, 3, None, 400), (30, 5, (29, 3, 11, 0, 17), 1500), (6, 1, (4,), 50), (5, 5, None, 400)],
)
def test_planted_teacher_is_right_on_fresh_data(d: int, k: int, support: tuple[int, ...] | None, width: int) -> None:
    teacher = planted_teacher(d, k, width, support=support, seed=2)
    ids, labels = ParityData(d, k, 4096, seed=77, support=support).arrays()
    logits = teacher(ids)
    assert (logits.argmax(-1) == labels).float().mean() >= 0.999
    assert not teacher.training


def test_planted_weights_are_as_documented() -> None:
    support, k = (9, 2, 14), 3
    teacher = planted_teacher(16, k, 600, support=support, noise=0.05, confidence=5.0)
    first = teacher.blocks[0]
    on, off = first.weight[:, list(support)], first.weight[:, [i for i in range(16) if i not in support]]
    assert set(on.unique().tolist()) == {-0.5, 0.5}
    assert off.std().item() == pytest.approx(0.05, rel=0.05)
    assert abs(off.mean().item()) < 4 * 0.05 / off.numel() ** 0.5
    assert first.bias.abs().max() <= k / 2
    assert first.bias.std().item() == pytest.approx(k / 12**0.5, rel=0.1)
    # the two logits are opposite, and of the size asked for
    assert torch.equal(teacher.head.weight[0], -teacher.head.weight[1])
    assert torch.equal(teacher.head.bias[:1], -teacher.head.bias[1:])
    logits = teacher(ParityData(16, k, 4096, seed=1, support=support).arrays()[0])
    assert logits[:, 1].abs().mean().item() == pytest.approx(5.0, rel=0.1)


def test_planted_teacher_without_noise_ignores_all_other_bits() -> None:
    teacher = planted_teacher(10, 2, 100, noise=0.0)
    ids = ParityData(10, 2, 50, seed=1).arrays()[0]
    changed = ids.clone()
    changed[:, 2:] = 1 - changed[:, 2:]
    assert torch.equal(teacher(ids), teacher(changed))


def test_planted_teacher_is_made_again_from_its_seed() -> None:
    one, two = planted_teacher(8, 2, 64, seed=4), planted_teacher(8, 2, 64, seed=4)
    other = planted_teacher(8, 2, 64, seed=5)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert not torch.equal(one.blocks[0].weight, other.blocks[0].weight)
    with pytest.raises(ValueError, match="got k=9"):
        planted_teacher(8, 9, 64)
