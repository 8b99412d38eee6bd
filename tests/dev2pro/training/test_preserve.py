import pytest
import torch
from torch.nn.functional import mse_loss

from dev2pro.errors import ConfigError
from dev2pro.models import flux1, lora
from dev2pro.models.encodings import NoisedBatch
from dev2pro.models.lora import AdapterConfig
from dev2pro.training.preserve import PreserveConfig, preservation_loss

SKS = PreserveConfig(weight=1.0, trigger="sks", class_word="dog")


@pytest.fixture
def model(tiny) -> torch.nn.Module:
    """A model with a LoRA that has no effect yet."""
    transformer = flux1.load_transformer(str(tiny))
    lora.inject(transformer, AdapterConfig(rank=4, alpha=4, targets="attention"), seed=0)
    return transformer


@pytest.fixture(scope="module")
def batch() -> NoisedBatch:
    x_t, x_0, noise = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    return NoisedBatch(x_t=x_t, x0=x_0, noise=noise, t=torch.tensor([0.2, 0.9]), conditioning=conditioning(1))


def conditioning(seed: int) -> flux1.Conditioning:
    draw = torch.Generator().manual_seed(seed)
    return flux1.build_conditioning(torch.randn(2, 8, 64, generator=draw), torch.randn(2, 64, generator=draw), (4, 4))


def give_effect(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 10


def test_a_lora_without_effect_changes_nothing_that_could_be_preserved(model, batch):
    loss = preservation_loss(model, batch, 3.5, conditioning(2))
    assert loss.item() == 0.0
    loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_it_is_the_error_of_the_class_caption_s_prediction_against_the_base_s_own(tiny, model, batch):
    give_effect(model)
    base = flux1.load_transformer(str(tiny))
    for guidance in (3.5, torch.tensor([2.0, 6.0])):
        kept = flux1.predict(base, batch.x_t, batch.t, conditioning(2), guidance)
        expected = mse_loss(flux1.predict(model, batch.x_t, batch.t, conditioning(2), guidance), kept)
        loss = preservation_loss(model, batch, guidance, conditioning(2))
        assert loss.item() == expected.item() > 0
    assert loss.item() != pytest.approx(preservation_loss(model, batch, guidance, batch.conditioning).item(), rel=1e-3)


def test_the_gradient_flows_through_the_pass_of_the_class_caption_alone(tiny, model, batch):
    give_effect(model)
    passes = []
    handle = model.register_forward_hook(lambda module, *_: passes.append((torch.is_grad_enabled(), switches(module))))
    preservation_loss(model, batch, 3.5, conditioning(2)).backward()
    handle.remove()
    assert passes == [(False, {True}), (True, {False})], "the LoRA is off where no gradient is wanted, and on where it is"
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all("lora" in name for name in found)
    model.zero_grad()
    constant = flux1.predict(flux1.load_transformer(str(tiny)), batch.x_t, batch.t, conditioning(2), 3.5).detach()
    mse_loss(flux1.predict(model, batch.x_t, batch.t, conditioning(2), 3.5), constant).backward()
    assert all(torch.equal(found[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)


def switches(model: torch.nn.Module) -> set[bool]:
    return {module.disable_adapters for module in model.modules() if isinstance(module, lora.LoraLayer)}


def test_a_lora_that_is_switched_off_is_on_again_afterwards_and_trainable_all_the_time(model):
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with lora.switched_off(model):
        assert switches(model) == {True}
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert switches(model) == {False}
    with pytest.raises(AttributeError), lora.switched_off(model):
        model.nothing()
    assert switches(model) == {False}, "even after an error"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of sks", "a photo of dog"),
        ("sks, sks!", "dog, dog!"),
        ("he asks for risks", "he asks for risks"),
        ("a SKS rifle", "a SKS rifle"),
        ("", ""),
    ],
)
def test_a_class_caption_has_the_class_for_every_trigger_that_is_a_word(caption, expected):
    assert SKS.class_caption(caption) == expected
    assert SKS.class_caption(expected) == expected


def test_a_trigger_and_a_class_are_texts_and_no_patterns():
    assert PreserveConfig(trigger="<a.b>", class_word=r"\1 {x}").class_caption("my <a.b>, my <axb>") == r"my \1 {x}, my <axb>"


def test_captions_without_the_trigger_are_told_and_none_with_it_is_refused():
    assert SKS.check_captions(["a sks", "sks"]) == ""
    assert '1 of 2 different captions have no such word, as "a cat"' in SKS.check_captions(["a sks", "a cat"])
    with pytest.raises(ConfigError, match=r'preserve\.trigger=sks is in no caption of data\.train; one is "a cat"'):
        SKS.check_captions(["a cat", "a task"])
    assert PreserveConfig(trigger="sks", class_word="dog").check_captions(["a cat"]) == "", "at weight 0 nothing is preserved"
    assert PreserveConfig(weight=1.0).check_captions(["a cat"]) == ""


@pytest.mark.parametrize(
    ("values", "dropout", "said"),
    [
        ({"weight": 1.0, "trigger": "sks"}, 0.0, "belong together"),
        ({"weight": 1.0, "class_word": "dog"}, 0.0, "belong together"),
        ({"weight": 1.0, "trigger": "sks", "class_word": "sks dog"}, 0.0, "holds preserve.trigger=sks"),
        ({"weight": 1.0}, 0.1, "caption_dropout=0.1 trains it"),
    ],
)
def test_what_cannot_be_preserved_is_refused(values, dropout, said):
    with pytest.raises(ConfigError, match=said):
        PreserveConfig(**values).check(dropout)


def test_what_can_be():
    for config, dropout in ((SKS, 0.1), (PreserveConfig(weight=1.0), 0.0), (PreserveConfig(), 0.1)):
        config.check(dropout)
