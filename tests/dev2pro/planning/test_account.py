"""The account of FLUX.1-dev at full size: the exact sums, the audit's figures, every hardware file, and what was refused too late."""

import re
from dataclasses import replace

import pytest
import torch

from dev2pro.errors import ConfigError
from dev2pro.planning import fake_models, fake_runs, plan, report
from dev2pro.planning.fake_runs import Shape
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.loss import flow_matching_loss
from dev2pro.training.optim import OptimConfig
from tests.dev2pro.planning.configs import ROOT, composed, planned

SQUARE = [(32, 32)]
NUMBERS = 11_901_408_320  # parameters of FLUX.1-dev's transformer
GB = 1e9
ONE_PICTURE = Shape(1, (64, 64), 64, (512, 4096), 768, torch.bfloat16)  # 1024 x 1024


def test_weights_and_gradients_are_exact():
    model = fake_models.transformer(fake_models.FLUX1_DEV, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == NUMBERS
    assert fake_runs.nbytes(model) == fake_runs.nbytes(model, trained=True) == 2 * NUMBERS


@pytest.mark.parametrize(("dtype", "name", "a_parameter"), [(torch.float32, "adamw", 8), (torch.bfloat16, "adamw_8bit", 2)])
def test_the_optimizer_s_own_moments(dtype, name, a_parameter):
    model = fake_models.transformer(fake_models.FLUX1_DEV, dtype)
    assert fake_runs.optimizer_state(OptimConfig(name=name, lr=1e-5), model) == pytest.approx(a_parameter * NUMBERS, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "peak"), [pytest.param(True, 48.0, marks=pytest.mark.ci), (False, 66.2)])
def test_a_step_of_12_b_parameters_needs_what_the_audit_found(checkpointing, peak):
    hardware = HardwareConfig(dtype="bfloat16", gradient_checkpointing=checkpointing)
    model = fake_models.transformer(fake_models.FLUX1_DEV, torch.bfloat16)
    step = fake_runs.training_step(model, ONE_PICTURE, lambda m, b: flow_matching_loss(m, b, 1.0), hardware, held=False, freed=False)
    assert (2 * NUMBERS + step.peak) / GB == pytest.approx(peak, abs=0.1)
    forward = 74.38e12  # of one picture and 512 tokens of text
    assert step.flops == pytest.approx((4.1 if checkpointing else 3.1) * forward, rel=0.02)  # attention's backward is 2.5 times its forward


@pytest.mark.slow
def test_the_account_of_a_recovery_is_the_exact_sum():
    account = planned("recover", composed("recover", "hardware=gpu80", "hardware.ema_offload=false", "hardware.step_in_backward=false"))
    train = account.gpu["train"]
    assert train["weights"] == 2 * NUMBERS
    assert train["gradients"] == 2 * NUMBERS
    assert train["moments"] == pytest.approx(2 * NUMBERS, rel=0.05)
    assert train["average"] == 4 * NUMBERS
    assert account.state == pytest.approx(8 * NUMBERS, rel=0.05)


def test_the_blocks_that_a_card_has_room_for_are_not_recomputed():
    def training(**values):
        config = composed("recover", "experiment=miniature", "hardware.gradient_checkpointing=true")
        config = replace(config, hardware=replace(config.hardware, **values))
        return config, plan.estimate("recover", config, SQUARE), sum(plan.estimate("recover", config, SQUARE).gpu["train"].values())

    config, needed, least = training()
    _, _, most = training(gradient_checkpointing=False)
    assert needed.blocks == 4
    card = (least + 0.55 * (most - least)) / (1 - report.SPARE)  # room for a half
    found = re.search(r"checkpointed_blocks=(\d) of 4", plan.fewer_recomputed("recover", config, SQUARE, needed, card))
    _, _, chosen = training(checkpointed_blocks=int(found[1]))
    assert 0.9 < chosen / (card * (1 - report.SPARE)) <= 1.01
    assert plan.fewer_recomputed("recover", config, SQUARE, needed, least) == ""


def test_an_evaluation_counts_its_style_judge_in_every_phase(tiny_dino):
    def gpu(*overrides: str) -> dict[str, dict[str, float]]:
        return planned("evaluate", composed("evaluate", "experiment=miniature", *overrides)).gpu

    alone, base, tiny = gpu(), gpu(f"style_judge={fake_models.DINOV2_BASE}"), gpu(f"style_judge={tiny_dino}")
    weights = sum(file.stat().st_size for file in tiny_dino.glob("*.safetensors"))
    for phase, parts in alone.items():
        assert base[phase]["style judge"] == 4 * 86_580_480  # float32
        assert tiny[phase]["style judge"] == pytest.approx(weights, rel=0.1)
        assert "style judge" not in parts
        assert {name: bytes for name, bytes in base[phase].items() if name not in ("style judge", "activations")} == {
            name: bytes for name, bytes in parts.items() if name != "activations"
        }
    assert base["judge"]["activations"] > alone["judge"]["activations"]
    assert base["sample"]["activations"] == alone["sample"]["activations"]


# ---- every hardware file, for what its first line says that it is for ---------------------------------------------------------------

FILES = {file.stem: file.read_text() for file in sorted((ROOT / "conf/hardware").glob("*.yaml"))}
SIZES = ("data.resolution=512", "data.resolution=1024")
RANKS = {"gpu8": "batch=256", "gpu64": "batch=2048"}


def cases() -> list:
    found = []
    for name, text in FILES.items():
        purpose = text.partition("\n")[0].partition(" for ")[2]
        of_stage = {"recover": re.search(r"\brecover\b", purpose), "lora": re.search(r"\bLoRAs?\b", purpose)}
        if "card_gb" in text:
            found += [(name, stage, size) for stage, named in of_stage.items() if named for size in SIZES]
            found += [(name, "encode", "resolution=1024")]
            found += [(name, "evaluate", "resolution=1024")] * bool(re.search("recover|evaluate", purpose))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage", "size"), cases())
def test_every_hardware_file_fits_its_card(name, stage, size):
    given = [RANKS[name]] if name in RANKS and stage == "recover" else []
    config = composed(stage, f"hardware={name}", size, *given)
    account = planned(stage, config)
    left = plan.spare(account, config.hardware.card_gb * GB)
    assert left >= report.SPARE, report.table(account, config, config.hardware.card_gb * GB)


def test_there_are_hardware_files_to_check():
    assert {name for name, _, _ in cases()} == set(FILES) - {"cpu"}
    assert {"recover", "lora", "encode", "evaluate"} == {stage for _, stage, _ in cases()}


# ---- what the audit found in commit 62143d3, refused now before it starts ---------------------------------------------------------------

GPU80 = ("hardware=gpu80", "hardware.micro_batch=4", "batch=64", "hardware.step_in_backward=false", "hardware.ema_offload=false")
GPU8 = ("hardware=gpu8", "hardware.encoder_dtype=null", "hardware.inference_dtype=null")


def refusal(stage: str, *overrides: str) -> str:
    config = composed(stage, *overrides)
    account = planned(stage, config)
    return " ".join(report.misfits(account, config, config.hardware.card_gb * GB))


@pytest.mark.slow
@pytest.mark.ci
def test_finding_5_recovery_on_one_80_gb_card_with_the_average_on_it():
    message = refusal("recover", *GPU80)
    assert re.search(r"recover needs 1\d\d GB of a GPU that has 85, in train: average 47\.6", message)
    assert "hardware.ema_offload=true" in message
    assert "hardware.step_in_backward=true" in message


@pytest.mark.slow
def test_a_sharded_step_holds_no_whole_gradient_however_many_micro_batches():
    one, many = (planned("recover", composed("recover", "hardware=gpu8", f"batch={batch}")).gpu["train"] for batch in (32, 256))
    assert many == one
    assert many["activations"] < 2 * NUMBERS / 2


@pytest.mark.slow
def test_finding_6_a_whole_gradient_on_each_of_eight_cards():
    config = composed("recover", *GPU8, "batch=256", "data.resolution=1024")
    account = planned("recover", config)
    train = account.gpu["train"] | {"T5 that stays": account.staying}
    assert not report.misfits(account, config, 85 * GB)
    held = replace(account, gpu={"train": train | {"a whole gradient": 2 * NUMBERS}})  # what no_sync held; the gradients are sharded now
    assert plan.spare(held, 85 * GB) < report.SPARE


@pytest.mark.slow
def test_finding_13_a_disk_for_one_checkpoint():
    message = refusal("recover", *GPU80, "hardware.card_gb=200", "hardware.disk_gb=150")
    assert re.search(r"recover needs 4\d\d GB of disk, and hardware.disk_gb is 150: checkpoints 4\d\d", message)
    assert "checkpoint.keep" in message


@pytest.mark.slow
def test_finding_16_evaluation_with_gpu8_in_float32():
    config = composed("evaluate", *GPU8, "resolution=1024", "sampling.batch=4")
    account = planned("evaluate", config)
    assert account.gpu["sample"]["weights"] == 4 * NUMBERS
    both = replace(account, gpu={"load": account.gpu["load"] | {"the one before": 4 * NUMBERS}})  # as it was: two at a time while loading
    assert "hardware.inference_dtype=bfloat16" in " ".join(report.misfits(both, config, 85 * GB))


def test_finding_19_sixteen_pictures_of_1024_px_in_the_vae():
    encoders = fake_models.encoders(composed("encode", "hardware=gpu24").model, torch.bfloat16)
    picture = fake_runs.picture_encoding(encoders, 1, (1024, 1024)).peak
    weights = fake_runs.nbytes(encoders.pipeline.vae) + fake_runs.nbytes(encoders.pipeline.text_encoder_2)
    assert picture == pytest.approx(1.35 * GB, rel=0.05)
    assert weights + 16 * picture > 25.3 * GB  # as it was


def test_a_misfit_is_a_configuration_error(capsys):
    config = composed("encode", "hardware=gpu24", "hardware.card_gb=8", "hardware.int8_encoders=false", "parts=[text]", "plan=true")
    with pytest.raises(ConfigError, match=r"encode needs [\d.]+ GB of a GPU that has 8, in encode text: T5 and CLIP 9\.77"):
        plan.check("encode", config, [(256, 256)])
    assert "encode on 1 GPU" in capsys.readouterr().out


def test_the_passes_and_the_teacher_of_a_lora_s_loss_are_counted():
    words, teacher = ["experiment=miniature", "trained_on=data/miniature/pipeline", "guidance=3.5"], "loss.teacher=data/miniature/teacher"
    plain, own, theirs, distilled = (
        planned("lora", composed("lora", *words, *more))
        for more in ([], ["loss.name=guidance"], ["loss.name=guidance", teacher], ["loss.name=distillation", teacher])
    )
    step, forward = plain.flops["a step"], plain.flops["measuring"]
    assert own.flops["a step"] - step == pytest.approx(forward, rel=0.05)
    teachers = theirs.flops["a step"] - step
    assert 0.7 * forward < teachers < forward  # it has no LoRA
    assert distilled.flops["a step"] - step == pytest.approx(2 * teachers, rel=0.001)
    assert "teacher" not in own.gpu["train"]
    assert theirs.gpu["train"]["teacher"] == distilled.gpu["train"]["teacher"] > 0


def test_what_is_preserved_costs_two_passes_and_one_back_and_the_activations_of_another_step():
    words = ["experiment=miniature", "trained_on=data/miniature/pipeline", "guidance=3.5"]
    plain, empty, trigger = (
        planned("lora", composed("lora", *words, *more))
        for more in ([], ["preserve.weight=1"], ["preserve.weight=1", "preserve.trigger=a", "preserve.class_word=b"])
    )
    step, forward = plain.flops["a step"], plain.flops["measuring"]
    more = empty.flops["a step"] - step
    assert step + 0.7 * forward < more < step + forward, "as a step of flow matching, and a pass without the LoRA"
    assert 1.7 < empty.gpu["train"]["activations"] / plain.gpu["train"]["activations"] < 2.1
    assert trigger.flops == empty.flops
    assert (empty.captions, trigger.captions) == (plain.captions, plain.captions // 2)
