"""Fine-tuning patched models with PEFT, Trainer, accelerate, DDP: registers learn, and come back.

What is saved is loaded by `phreg.load`, or by nobody: stock classes refuse it. A PEFT adapter alone says
nothing of registers, so it names the model that has them.
"""

import copy
import json
import socket
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from families_timm import FAMILIES as TIMM
from families_transformers import FAMILIES
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

import phreg
from phreg.backbones import resolve
from phreg.backbones.resolve import adapt
from phreg.formats.export import export

COUNT = 3
PICTURES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 5
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums in another order; a missing register changes the first digits."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT uses it
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning",
)


class Labelled(torch.utils.data.Dataset):
    def __len__(self):
        return len(PICTURES)

    def __getitem__(self, index):
        return {"pixel_values": PICTURES[index], "labels": LABELS[index]}


def classifier():
    return phreg.add_registers(FAMILIES["vit-classifier"](), COUNT)


def scores(model):
    with torch.no_grad():
        answer = model.eval()(PICTURES)
    return answer if torch.is_tensor(answer) else answer.logits


def train(model, steps=5):
    """Trains what requires a gradient, on all pictures, and returns the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        answer = model(PICTURES)
        answer = answer if torch.is_tensor(answer) else answer.logits
        loss = torch.nn.functional.cross_entropy(answer, LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- PEFT ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned():
    """A patched classifier with LoRA and trainable registers, trained some steps, and its first losses."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["registers", "classifier"])
    model = peft.get_peft_model(classifier(), config)
    losses = train(model)
    assert losses[-1] < losses[0]
    return model


def test_a_peft_adapter_comes_back_onto_the_patched_model(tuned, tmp_path):
    untuned = adapt(classifier()).registers
    tuned.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.vit.registers.tokens"]
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path)
    assert not torch.equal(saved, untuned)
    assert torch.equal(scores(again), scores(tuned))
    # PEFT drops what a model has no place for, and says nothing; the README warns of it.
    onto_stock = peft.PeftModel.from_pretrained(FAMILIES["vit-classifier"](), tmp_path)
    assert not [name for name, _ in onto_stock.named_parameters() if "registers" in name]


def test_merged_it_saves_and_loads_with_its_registers_and_not_as_a_stock_model(tuned, tmp_path):
    expected = scores(tuned)
    merged = tuned.merge_and_unload()
    assert torch.allclose(scores(merged), expected, **ROUNDING)
    merged.save_pretrained(tmp_path)
    assert torch.equal(scores(phreg.load(tmp_path)), scores(merged))
    assert adapt(phreg.load(tmp_path)).num_registers == COUNT
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        hf.ViTForImageClassification.from_pretrained(tmp_path)


def test_lora_on_a_patched_model_of_timm_trains_merges_and_exports(tmp_path):
    model = phreg.add_registers(TIMM["vit"](), COUNT)
    # timm's registers are a parameter of the model itself, which PEFT freezes with the rest.
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    adapt(model).registers.requires_grad_(True)
    before = adapt(model).registers.detach().clone()
    losses = train(tuned)
    assert losses[-1] < losses[0]
    expected = scores(tuned)
    merged = tuned.merge_and_unload()
    assert not torch.equal(adapt(merged).registers, before)
    phreg.export(merged, tmp_path / "out", format="timm")
    again = phreg.load(tmp_path / "out")
    assert torch.allclose(scores(again), expected, **ROUNDING)


# PEFT looks there for a config.json, to find out whether a vocabulary grew.
@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
def test_an_adapter_trained_on_a_loaded_model_names_the_folder_that_has_its_registers(tmp_path):
    classifier().save_pretrained(tmp_path / "patched")
    model = peft.get_peft_model(phreg.load(tmp_path / "patched"), peft.LoraConfig(target_modules=["q_proj"]))
    train(model)
    model.save_pretrained(tmp_path / "lora")
    named = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == tmp_path / "patched"
    again = peft.PeftModel.from_pretrained(phreg.load(named), tmp_path / "lora")
    assert torch.equal(scores(again), scores(model))


# -- Trainer -------------------------------------------------------------------------------------------------


def trainer(model, folder, **changes):
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = hf.TrainingArguments(str(folder), **settings | changes)
    return hf.Trainer(model, arguments, train_dataset=Labelled())


def test_trainer_finetunes_a_patched_classifier_and_its_checkpoints_keep_the_registers(tmp_path):
    model = classifier()
    before = adapt(model).registers.detach().clone()
    run = trainer(model, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(adapt(model).registers, before)
    assert torch.equal(scores(phreg.load(tmp_path / "checkpoint-4")), scores(model))
    assert adapt(phreg.load(tmp_path / "checkpoint-2")).num_registers == COUNT
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        hf.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-4", config=model.config)


def test_gradient_checkpointing_trains_a_patched_classifier_to_the_same_weights(tmp_path):
    plain, checkpointed = classifier(), classifier()
    trainer(plain, tmp_path / "plain").train()
    trainer(checkpointed, tmp_path / "checkpointed", activation_checkpointing=True).train()
    assert checkpointed.is_gradient_checkpointing
    for name, tensor in plain.state_dict().items():
        assert torch.equal(checkpointed.state_dict()[name], tensor), name


def test_trainer_does_not_resume_from_a_format_that_is_not_its_own_and_says_so(tmp_path):
    trainer(classifier(), tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer(classifier(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_trainer_resumes_a_remote_code_export_which_the_stock_class_still_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    backbone, base = resolve.load(classifier())
    export(backbone, tmp_path / "out", "remote-code", base=base)
    auto = hf.AutoModelForImageClassification

    def model():
        return auto.from_pretrained(tmp_path / "out", trust_remote_code=True)

    straight, resumed = model(), model()
    trainer(straight, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert not torch.equal(straight.vit.registers.tokens, backbone.registers)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    with pytest.raises(StrictDataclassError, match="registers, which take trust_remote_code=True"):
        hf.ViTForImageClassification.from_pretrained(checkpoint)


# -- accelerate and DDP --------------------------------------------------------------------------------------


def test_accelerate_prepares_trains_and_restores_a_patched_model(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(4):
        loss = model(PICTURES, labels=LABELS).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    kept, expected = adapt(accelerator.unwrap_model(model)).registers.detach().clone(), scores(model)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        adapt(model).registers.zero_()
    accelerator.load_state(tmp_path)
    assert torch.equal(adapt(model).registers, kept)
    assert torch.equal(scores(model), expected)


HALVES = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import phreg
from phreg.backbones.resolve import adapt
distributed.init_process_group("gloo")
rank = distributed.get_rank()
model, images, labels = torch.load(sys.argv[1], weights_only=False)
half = slice(rank * 8, rank * 8 + 8)
wrapped = DistributedDataParallel(model.train())
torch.nn.functional.cross_entropy(wrapped(images[half]), labels[half]).backward()
torch.save(adapt(model).registers.grad, f"{sys.argv[1]}.{rank}")
distributed.destroy_process_group()
"""


def test_ddp_averages_the_gradients_of_registers_over_two_processes(tmp_path):
    model = phreg.add_registers(TIMM["vit"](), COUNT)
    torch.save((model, PICTURES, LABELS), tmp_path / "task")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    (tmp_path / "halves.py").write_text(HALVES)
    command = [sys.executable, *launch, "--master-port", str(port), tmp_path / "halves.py", tmp_path / "task"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole = copy.deepcopy(model).train()
    torch.nn.functional.cross_entropy(whole(PICTURES), LABELS).backward()
    first, second = (torch.load(tmp_path / f"task.{rank}", weights_only=True) for rank in (0, 1))
    assert first.abs().sum(-1).min() > 0
    assert torch.equal(first, second)
    assert torch.allclose(first, adapt(whole).registers.grad, **ROUNDING)
