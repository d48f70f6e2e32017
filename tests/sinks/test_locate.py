"""Sinks whose cause is known are planted; the search has to find the cause, all of it and nothing else."""

import pytest
import torch
from families import FAMILIES
from planted import CORNERS, Planted, pictures
from sinking import faint, photographs, plant, pushed

from phreg import demo
from phreg.backbones.resolve import adapt
from phreg.errors import DataError
from phreg.sinks.locate import find_sinks
from phreg.sinks.units import ahead_of


@pytest.fixture(scope="module")
def images():
    return photographs()


@pytest.fixture(scope="module")
def found(images):
    return find_sinks(adapt(demo.demo_model()), images.split(8))


def names(units):
    return {(unit.block, unit.index) for unit in units}


PLANT = {(demo.SINK_BLOCK, demo.CORNER_NEURON), (demo.SINK_BLOCK, demo.BACKGROUND_NEURON)}


def test_the_planted_neurons_are_named_alone_and_explain_every_outlier(found):
    assert names(found.units) == PLANT
    assert found.explained == 1.0
    assert found.block == demo.SINK_BLOCK
    assert sum(unit.share for unit in found.units) == pytest.approx(1, abs=0.1), "shares add up to 1"
    assert all(unit.sink_level > 10 > abs(unit.baseline) for unit in found.units)


def test_content_sets_off_most_of_them_and_the_upstream_detector_is_named(found):
    assert not found.fixed
    assert (demo.DETECTOR_BLOCK, demo.DETECTORS[0]) in names(found.chain)
    assert all(unit.block < demo.SINK_BLOCK for unit in found.chain)
    assert [unit.share for unit in found.chain] == sorted((u.share for u in found.chain), reverse=True)


def test_attention_falls_on_them_after_their_block_and_not_before(found):
    before, after = found.attention[: demo.SINK_BLOCK + 1], found.attention[demo.SINK_BLOCK + 1 :]
    assert len(found.attention) == demo.DEPTH
    assert min(after) > 3 * max(before)


def test_neurons_that_respond_to_other_outliers_are_of_other_clusters_each_with_its_own_triggers(found):
    order = found.norms.position_histogram.flatten()
    corners = [0, demo.GRID - 1, demo.GRID * (demo.GRID - 1), demo.GRID**2 - 1]
    assert (order[corners] == 1).all()
    background, corner = found.triggers
    assert {unit.index: unit.cluster for unit in found.units} == {
        demo.BACKGROUND_NEURON: 0,
        demo.CORNER_NEURON: 1,
    }
    to = demo._directions()
    assert len(corner) == len(corners)
    assert len(background) == round(order.sum().item() - len(corners)), "as many as an image has"
    # A trigger has the mark of its cluster, and the mean content there besides.
    for own, others, mark in (
        (corner, background, demo.CORNER_MARK * to.corner),
        (background, corner, demo.QUIET_MARK * to.quiet),
    ):
        marked = (mark @ mark).float() / 2
        assert (own @ mark.float() > marked).all()
        assert (others[:2] @ mark.float() < marked).all(), "the third corner happens to be marked quiet, too"


def test_what_json_holds_names_the_causes(found):
    written = found.to_json()
    assert written["emergence_block"] == demo.SINK_BLOCK
    assert {(unit["block"], unit["index"]) for unit in written["units"]} == PLANT
    assert written["triggered_by"] == "content"
    assert {unit["kind"] for unit in written["units"]} == {0, 1}
    assert {unit["kind"] for unit in written["chain"]} == {None}


def test_the_clean_twin_has_no_sinks(images):
    assert find_sinks(adapt(demo.demo_model(planted=False)), images.split(8)) is None


def test_the_same_images_give_the_same_answer_and_so_does_another_batching(images):
    found, again, other = (find_sinks(adapt(demo.demo_model()), images[:8].split(size)) for size in (8, 8, 3))
    assert again.to_json() == found.to_json()
    assert names(other.units) == names(found.units)
    assert names(other.chain) == names(found.chain)
    for one, two in zip(other.units, found.units, strict=True):
        # Batches of another size take other kernels: the rounding of fp32.
        assert (one.sink_level, one.baseline, one.share) == pytest.approx(
            (two.sink_level, two.baseline, two.share), rel=1e-4, abs=1e-4
        )
    for one, two in zip(other.triggers, found.triggers, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_the_model_is_left_as_it_was(images):
    backbone = adapt(demo.demo_model())
    before = backbone(images[:2])
    find_sinks(backbone, images[:8].split(8))
    after = backbone(images[:2])
    assert torch.equal(before.patches, after.patches)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_images_of_two_sizes_or_none_at_all_are_refused():
    backbone = adapt(FAMILIES["transformers/dinov2"]())
    with pytest.raises(DataError, match="no images"):
        find_sinks(backbone, [])
    with pytest.raises(DataError, match="one size"):
        find_sinks(backbone, [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 48)])


def test_two_clusters_of_sinks_in_two_blocks_are_both_found(images):
    torch.manual_seed(0)
    backbone = adapt(demo.demo_model())
    with torch.no_grad():
        backbone.model.pos_embed[0, 75] += demo._directions().context[5].float()
    write = torch.nn.functional.normalize(torch.randn(demo.WIDTH), dim=0)
    plant(backbone, 4, 11, images, patch=75, write=4 * write)  # 40 in all; the others' are near 27
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == PLANT | {(4, 11)}
    assert found.explained > 0.99
    assert found.by_block().keys() == {demo.SINK_BLOCK, 4}
    assert {unit.cluster for unit in found.units} == {0, 1, 2}
    assert len(found.triggers[found.by_block()[4][0].cluster]) == 1, "it answers to one patch"


def searches(caplog):
    """How often units were named and tried."""
    return sum("trying whether" in record.message for record in caplog.records)


@pytest.mark.parametrize("smallest", [0.05, 0.5])  # a half is what each of them makes
def test_the_search_goes_on_until_the_sinks_of_every_block_are_gone(tiny, monkeypatch, caplog, smallest):
    caplog.set_level("INFO", "phreg.sinks.causes")
    monkeypatch.setattr("phreg.sinks.causes.WORTH_IT", smallest)
    backbone = adapt(tiny(depth=4))
    images = faint(backbone)
    plant(backbone, 1, 5, images)
    write = 100 * torch.randn(backbone.spec.width, generator=torch.Generator().manual_seed(3))
    plant(backbone, 2, 9, images, patch=6, write=write)
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5), (2, 9)}
    assert found.explained == 1.0
    assert searches(caplog) == 2


def test_the_search_ends_when_too_few_sinks_are_left_to_matter(tiny, monkeypatch, caplog):
    caplog.set_level("INFO", "phreg.sinks.causes")
    monkeypatch.setattr("phreg.sinks.causes.WORTH_IT", 0.6)
    backbone = adapt(tiny())
    images = faint(backbone)
    pushed(backbone.model.blocks[1].attn, token=1)  # of each image one sink is attention's, two are of units
    plant(backbone, 1, 5, images, patch=10)
    plant(backbone, 1, 9, images, patch=6)
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5), (1, 9)}
    assert found.explained == pytest.approx(2 / 3)
    assert searches(caplog) == 1


def test_units_that_share_their_outliers_are_one_cluster_whose_triggers_are_those_of_all():
    backbone = adapt(FAMILIES["timm/vit"]())
    images = faint(backbone)
    plant(backbone, 1, 5, images)
    alone = find_sinks(backbone, images.split(8))
    write = 100 * torch.randn(backbone.spec.width, generator=torch.Generator().manual_seed(3))
    plant(backbone, 1, 9, images, write=write)
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5), (1, 9)}
    assert [unit.cluster for unit in found.units] == [0, 0]
    assert torch.equal(found.triggers[0], alone.triggers[0])


def test_a_unit_that_answers_to_all_but_the_outliers_is_no_cause():
    backbone = adapt(FAMILIES["timm/vit"]())
    images = faint(backbone)
    plant(backbone, 1, 5, images)
    mlp = backbone.mlp(1)
    plant(backbone, 1, 9, images, write=-0.2 * mlp.down.weight[:, 5].detach())
    with torch.no_grad():
        for parameter, rows in mlp.rows(torch.tensor([9])):
            parameter[rows] *= -1  # silent on the sink, 10 elsewhere, and a sixth of what tells the two apart
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5)}
    assert found.explained == 1.0


@pytest.mark.parametrize(
    "family",
    [
        "timm/eva02",
        "timm/dinov2-swiglu",
        "transformers/dinov2-swiglu",
        "transformers/dinov3-gated",
        "timm/vit",
        "transformers/clip-vision",
        "open_clip/clip",
    ],
)
def test_a_unit_is_found_in_plain_gated_split_and_fused_mlps(family):
    backbone = adapt(FAMILIES[family]())
    images = faint(backbone)
    plant(backbone, 1, 5, images)
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5)}
    assert found.explained == 1.0
    assert found.block == 1


def test_another_size_than_the_models_own_works():
    backbone = adapt(FAMILIES["transformers/dinov2"]())
    images = faint(backbone, size=(64, 48))
    plant(backbone, 1, 5, images)
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5)}
    assert found.fixed
    assert found.norms.position_histogram.shape == (8, 6)
    assert found.norms.position_histogram[0, 0] == 1


def test_sinks_that_are_shorter_than_other_tokens_are_found_too(tiny):
    backbone = adapt(tiny(depth=4))
    common = torch.zeros(32)
    common[3] = 30.0
    with torch.no_grad():
        backbone.model.pos_embed.add_(
            0.3 * torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
        )
        backbone.model.patch_embed.proj.bias.add_(common)
    images = faint(backbone)
    plant(backbone, 2, 7, images, write=-common / 10)  # it answers with 10
    found = find_sinks(backbone, images.split(8))
    assert found.norms.blocks[found.norms.focus].gap.side == "low"
    assert names(found.units) == {(2, 7)}
    assert found.explained == 1.0


def test_where_no_mlp_can_be_read_no_unit_is_named():
    backbone = Planted({2: (CORNERS, 100.0)})
    found = find_sinks(backbone, [pictures(40)])
    assert found.units == ()
    assert found.explained == 0
    assert found.chain == ()
    assert found.block == 2
    assert found.attention is None, "its blocks attend to nothing"
    assert [len(own) for own in found.triggers] == [len(CORNERS)]


@pytest.mark.parametrize("cause", ["attention", "position embedding"])
def test_sinks_that_no_unit_makes_are_blamed_on_none(tiny, cause):
    backbone = adapt(tiny())
    if cause == "attention":
        pushed(backbone.model.blocks[1].attn, token=1)
    else:
        with torch.no_grad():
            backbone.model.pos_embed[0, 1] *= 1e5
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = find_sinks(backbone, images.split(8))
    assert found.units == ()
    assert found.explained == 0
    assert found.by_block() == {}
    assert found.attention is not None


@pytest.mark.parametrize(("smallest", "named"), [(0.5, {(1, 9)}), (0.51, set())])
def test_units_count_from_the_smallest_share_of_the_sinks_that_is_worth_it(
    tiny, monkeypatch, smallest, named
):
    monkeypatch.setattr("phreg.sinks.causes.WORTH_IT", smallest)
    backbone = adapt(tiny())
    images = faint(backbone)
    pushed(backbone.model.blocks[1].attn, token=1)  # of each image one sink is attention's, one is the unit's
    plant(backbone, 1, 9, images, patch=6)
    found = find_sinks(backbone, images.split(8))
    assert found.norms.position_histogram.sum() == 2
    assert names(found.units) == named
    assert found.explained == (0.5 if named else 0)


def test_an_mlp_that_writes_nothing_is_not_blamed(tiny, caplog):
    backbone = adapt(tiny())
    pushed(backbone.model.blocks[1].attn, token=1)
    torch.nn.init.zeros_(backbone.mlp(1).down.weight)
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with caplog.at_level("INFO", "phreg.sinks.causes"):
        found = find_sinks(backbone, images.split(8))
    assert found.units == ()
    assert "in block 1: trying whether hidden units cause them (0)" in caplog.text


@pytest.mark.real
def test_one_unit_makes_the_corner_sinks_of_a_real_vit(real_model, real_data):
    from phreg import api
    from phreg.data.crops import centre_crops
    from phreg.data.sources import Subset, open_images

    backbone, _ = api.open_model(str(real_model))
    source = open_images(real_data / "imagenet_samples")
    images = list(centre_crops(backbone, Subset(source, range(0, len(source), len(source) // 64)[:64]), 224))
    found = find_sinks(backbone, images)
    assert names(found.units) == {(7, 417)}
    assert found.explained > 0.99
    assert (6, 189) in names(found.chain)
    assert found.fixed
    assert len(found.triggers[0]) == 4
    assert found.attention[-1] > 0.2


# -- measured by hand ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """A tiny ViT with one planted unit, twenty images, and all that is measured, by hooks of our own."""
    backbone = adapt(FAMILIES["timm/vit"]())
    images = faint(backbone, count=20)
    plant(backbone, 1, 5, images)
    model, seen = backbone.model, {}
    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(entry=args[0]))]
    for number in (0, 1):
        mlp = model.blocks[number].mlp
        hooks += [
            mlp.fc2.register_forward_pre_hook(lambda _, args, n=number: seen.update({f"hidden{n}": args[0]})),
        ]
    for number, block in enumerate(model.blocks):
        keep = lambda _, args, n=number: seen.update({f"attended{n}": args[0]})  # noqa: E731
        hooks.append(block.attn.register_forward_pre_hook(keep))
    model(images)
    for hook in hooks:
        hook.remove()
    return backbone, images, seen, find_sinks(backbone, images.split(8))


# The sequence is CLS, then the patches; the planted unit answers to the first of them alone.
SINK, OTHERS = 1, slice(2, None)


def test_sink_level_baseline_and_share_of_a_cause_are_those_measured_by_hand(planted):
    backbone, _, seen, found = planted
    (cause,) = found.units
    hidden = seen["hidden1"].detach().double()
    sink, others = hidden[:, SINK], hidden[:, OTHERS].flatten(0, 1)
    # fp32 against fp64, on values around 10: a few units in the sixth place.
    assert cause.sink_level == pytest.approx(((sink[:, 5] ** 2).sum() / sink[:, 5].sum()).item(), rel=1e-5)
    assert cause.baseline == pytest.approx(others[:, 5].mean().item(), abs=1e-5)
    excess = sink.mean(0) - others.mean(0)
    down = backbone.model.blocks[1].mlp.fc2.weight.detach().double()
    write = down @ excess
    assert cause.share == pytest.approx((excess[5] * (down[:, 5] @ write) / (write @ write)).item(), rel=1e-5)
    assert (cause.cluster, cause.block, found.explained) == (0, 1, 1.0)


def test_shares_are_of_the_write_however_short_it_is(tiny):
    backbone = adapt(tiny())
    images = faint(backbone)
    short = 0.015 * torch.randn(backbone.spec.width, generator=torch.Generator().manual_seed(2))
    plant(backbone, 1, 5, images, write=short)
    read = []
    with torch.no_grad(), ahead_of(backbone.mlp(1).down, lambda _, args: read.append(args[0].double())):
        backbone.run(images)
    excess = read[0][:, SINK].mean(0) - read[0][:, OTHERS].mean((0, 1))
    down = backbone.mlp(1).down.weight.detach().double()
    write = down @ excess
    assert write.norm() < 1
    (cause,) = find_sinks(backbone, images.split(8)).units
    assert cause.share == pytest.approx((excess[5] * (down[:, 5] @ write) / (write @ write)).item(), rel=1e-5)


def test_what_a_half_precision_model_shows_is_summed_in_more_than_its_own_precision():
    backbone = adapt(FAMILIES["transformers/dinov2"]())
    images = faint(backbone, count=20)
    plant(backbone, 1, 5, images)
    backbone.model.bfloat16()
    images = images.bfloat16()
    mlp, before, read, entry = backbone.mlp(1), [], [], []
    with (
        torch.no_grad(),
        ahead_of(backbone.mlp(0).down, lambda _, args: before.append(args[0].double())),
        ahead_of(mlp.down, lambda _, args: read.append(args[0].double())),
        ahead_of(backbone.first_block_input, lambda _, args: entry.append(args[0].double())),
    ):
        tokens = torch.cat([backbone.block_tokens(part, [1])[1] for part in images.split(8)])
    patches = backbone.layout(images).patches
    norms = patches(tokens).double().norm(dim=-1)
    sinks = norms > 3 * norms.median()  # far beyond whatever bf16 rounds
    hidden, entered = (patches(torch.cat(parts)) for parts in (read, entry))
    found = find_sinks(backbone, images.split(8))
    (cause,) = found.units
    answers = hidden[sinks][:, 5]
    # A sum rounded to bf16 would be off by up to 4e-3.
    assert (cause.block, cause.index) == (1, 5)
    assert cause.sink_level == pytest.approx((answers.square().sum() / answers.sum()).item(), rel=1e-5)
    assert cause.baseline == pytest.approx(hidden[~sinks][:, 5].mean().item(), rel=1e-5)
    ordinary = patches(torch.cat(before))[~sinks].mean(0)
    assert found.chain
    assert all(one.baseline == pytest.approx(ordinary[one.index].item(), rel=1e-4) for one in found.chain)
    most = sinks.sum(0).argmax()
    trigger = entered[sinks[:, most], most].mean(0, keepdim=True)
    torch.testing.assert_close(found.triggers[0].double(), trigger, rtol=1e-5, atol=1e-6)


def test_the_trigger_is_the_mean_of_what_enters_the_blocks_at_the_sinks(planted):
    _, _, seen, found = planted
    torch.testing.assert_close(found.triggers[0], seen["entry"][:, SINK].mean(0, keepdim=True).detach())


def test_the_share_of_attention_is_that_of_cls_on_the_sinks(planted):
    backbone, _, seen, found = planted
    expected = []
    for number, block in enumerate(backbone.model.blocks):
        attention = block.attn
        qkv = attention.qkv(seen[f"attended{number}"]).unflatten(-1, (3, attention.num_heads, -1))
        queries, keys, _ = qkv.unbind(2)
        scores = torch.einsum("bhd,bthd->bht", queries[:, 0], keys) / keys.shape[-1] ** 0.5
        expected.append(scores.softmax(-1)[..., SINK].mean().item())
    assert found.attention == pytest.approx(expected, rel=1e-4)


def test_the_chain_is_excess_times_gradient_on_the_first_images(planted):
    backbone, images, seen, found = planted
    traced, read = images[:16], {}
    blocks = backbone.model.blocks
    hooks = [
        blocks[number].mlp.fc2.register_forward_pre_hook(lambda _, args, n=number: read.update({n: args[0]}))
        for number in (0, 1)
    ]
    with torch.enable_grad():
        backbone.model(traced)
        (gradient,) = torch.autograd.grad(read[1][:, SINK, 5].sum(), read[0])
    for hook in hooks:
        hook.remove()
    baseline = seen["hidden0"][:, OTHERS].detach().double().mean((0, 1))
    excess = read[0][:, SINK].detach().double() - baseline
    (cause,) = found.units
    shares = (excess * gradient[:, SINK].double()).mean(0) / (cause.sink_level - cause.baseline)
    expected = {unit: share for unit, share in enumerate(shares.tolist()) if share >= 0.05}
    # Excesses are differences of fp32 numbers that nearly agree.
    assert {unit.index: unit.share for unit in found.chain} == pytest.approx(expected, rel=1e-2)
    assert all((unit.block, unit.cluster) == (0, None) for unit in found.chain)
    for unit in found.chain:
        sink = seen["hidden0"][:, SINK, unit.index].detach().double()
        assert unit.sink_level == pytest.approx(((sink**2).sum() / sink.sum()).item(), rel=1e-4, abs=1e-6)
        assert unit.baseline == pytest.approx(baseline[unit.index].item(), rel=1e-4, abs=1e-6)


def test_what_json_holds_of_a_unit_is_all_of_it(planted):
    _, _, _, found = planted
    written = found.to_json()
    (unit,), (cause,) = written["units"], found.units
    assert unit == {
        "block": 1,
        "index": 5,
        "level": cause.sink_level,
        "ordinary": cause.baseline,
        "share": cause.share,
        "kind": 0,
    }
    assert written["explained"] == 1.0
    assert written["attention_share"] == list(found.attention)
    assert [one["index"] for one in written["chain"]] == [one.index for one in found.chain]
    assert written["triggered_by"] == "position"


def read_unit(backbone, images, unit):
    """A hidden unit of block 1 on the first patch of each image."""
    hidden = []
    with torch.no_grad(), ahead_of(backbone.mlp(1).down, lambda _, args: hidden.append(args[0])):
        backbone.run(images)
    return hidden[0][:, backbone.spec.num_prefix, unit]


def test_a_cause_may_be_negative():
    family = "timm/dinov2-swiglu"
    levels = []
    for half in (0, 1):  # of which one is the gate: negated, it would silence the unit
        backbone = adapt(FAMILIES[family]())
        images = faint(backbone)
        plant(backbone, 1, 5, images)
        mlp = backbone.mlp(1)
        with torch.no_grad():
            for parameter, rows in mlp.rows(torch.tensor([5])):
                parameter[rows[half]] *= -1
        answer = read_unit(backbone, images, 5)
        level = (answer.square().sum() / answer.sum()).item()
        if level < -10:
            levels.append(level)
            found = find_sinks(backbone, images.split(8))
            assert names(found.units) == {(1, 5)}
            assert found.units[0].sink_level == pytest.approx(level, rel=1e-4)
            assert found.explained == 1.0
    assert len(levels) == 1


def test_a_pair_of_units_that_cancel_elsewhere_is_named_together(tiny):
    backbone = adapt(tiny(depth=4))
    images = faint(backbone)
    write = 100 * torch.randn(backbone.spec.width, generator=torch.Generator().manual_seed(2))
    plant(backbone, 1, 5, images, write=write)
    plant(backbone, 1, 9, images, write=-0.5 * write)
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5), (1, 9)}
    assert found.explained == 1.0


def test_a_unit_that_makes_the_sinks_where_an_earlier_one_does_not_is_named_too(tiny):
    backbone = adapt(tiny(depth=4))
    images = faint(backbone)
    write = 100 * torch.randn(backbone.spec.width, generator=torch.Generator().manual_seed(2))
    plant(backbone, 2, 9, images, write=write)
    plant(backbone, 1, 5, images, write=write)  # ahead of the other; fixed alone, it takes away no sink
    found = find_sinks(backbone, images.split(8))
    assert names(found.units) == {(1, 5), (2, 9)}
    assert (found.explained, found.block) == (1.0, 1)


# -- populations ---------------------------------------------------------------------------------------------


def behind(first, second):
    """A tower whose first sinks hide the second: their gap is the wider."""
    return Planted({1: (CORNERS, first), 2: ((20, 27), second)})


def test_sinks_that_longer_ones_hide_are_a_population_of_their_own():
    backbone = behind(1e6, 100.0)
    assert find_sinks(behind(1e6, 0.0), [pictures(40)]).norms.outlier_rate == len(CORNERS) / 64
    found = find_sinks(backbone, [pictures(40)])
    assert [(each.block, each.last_block) for each in found.populations] == [(1, 3), (2, 3)]
    assert [each.rate for each in found.populations] == [len(CORNERS) / 64, 2 / 64]
    assert [len(own) for own in found.triggers] == [len(CORNERS), 2]
    assert [(each.cluster, each.block) for each in found.directions] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
    ]
    assert found.block == 1, "that of the larger population"


def test_a_model_with_one_kind_of_sink_has_one_population(found):
    assert len(found.populations) == 1
    (only,) = found.populations
    assert (only.units, only.explained, only.block) == (found.units, found.explained, found.block)
    written = only.to_json()
    assert written["units"] == 2
    assert written["kind"]["writer"] == "units"
    assert [each["block"] for each in written["directions"]] == [each.block for each in found.directions]


def test_sinks_show_a_row_a_population():
    assert str(find_sinks(behind(1e6, 100.0), [pictures(40)])) == (
        "Sinks, triggered by position\n"
        "  blocks  patches  written by  hidden units   attention\n"
        "  1 to 3  6.25 %   unknown     0 explain 0 %  unknown\n"
        "  2 to 3  3.12 %   unknown     0 explain 0 %  unknown"
    )
