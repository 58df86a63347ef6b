"""Train what ptq-diffusion embeds: three small denoisers of 16 x 16 digits, and a classifier of them.

    python tools/train_denoiser.py [NAME …] [--data FOLDER] [--output FOLDER] [--steps N] [--seed 0]

Names: classifier, unet, unet-classes, dit; by default all, in this order, for the cards of the denoisers
quote the classifier. With --data, a folder with MNIST in idx files (`t10k-images-idx3-ubyte.gz`,
`t10k-labels-idx1-ubyte.gz`), the 28 x 28 images are padded to 32 and averaged to 16; without it,
scikit-learn's digits are enlarged from 8 to 16. Models are called mnist-NAME or digits-NAME accordingly.

Recipe of a denoiser: predicts the noise; 1,000 timesteps, betas linear from 1e-4 to 0.02; 4,500 steps of
64 images; AdamW, learning rate 2e-3 with a warm-up of 100 steps and a cosine to 0, weight decay 0.01;
moving average of the weights, 0.995. Of the classifier: nine of ten images, 12 epochs of Adam, one-cycle
to 3e-3, images moved by up to one pixel; to every 64 images 16 without a digit, for which all classes are
to be equally likely, so that confidence tells digits from noise. Seed 0. One thread; the same seed gives
the same bytes.

Time on one core: classifier half a minute, each denoiser 7 to 10 minutes. A stopped training continues
where it last saved, every 250 steps, in a folder of the system's temporary directory.
"""

import argparse
import gzip
import math
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ptq_diffusion import embedded
from ptq_diffusion.classifier import CLASSES, SIDE, WEIGHTS, Classifier, load_classifier
from ptqcore import DataError, PtqError, say, track

_BATCH = 64
_STEPS = 4500
_RATE = 2e-3
_WARM_UP = 100
_AVERAGE = 0.995
_HIDDEN_LABELS = 0.1
_SAVE_EVERY = 250
_EPOCHS = 12
_SHOWN = 128
_SAMPLING_STEPS = 20


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 16, 16] in [0, 1], their labels [n], and what a card says of them."""

    name: str
    images: Tensor
    labels: Tensor
    origin: str


def mnist(folder: Path) -> Digits:
    """The MNIST test set, from two gzipped idx files."""
    pixels = _idx(folder / "t10k-images-idx3-ubyte.gz", 3)
    labels = _idx(folder / "t10k-labels-idx1-ubyte.gz", 1)
    padded = F.pad(torch.from_numpy(pixels).float()[:, None] / 255, (2, 2, 2, 2))
    origin = (
        "the 10,000 images of the MNIST test set (Y. LeCun, C. Cortes, C. Burges; from NIST), padded to "
        "32 x 32 and averaged to 16 x 16. Licence of the data: Creative Commons "
        "Attribution-Share Alike 3.0. The images themselves are not part of this project."
    )
    return Digits("mnist", F.avg_pool2d(padded, 2), torch.from_numpy(labels).long(), origin)


def scikit_learn_digits() -> Digits:
    """The digits that come with scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(small, (SIDE, SIDE), mode="bilinear").clamp(0, 1)
    origin = (
        "scikit-learn's copy of 1,797 UCI optical digits (E. Alpaydin, C. Kaynak), enlarged from 8 x 8 to "
        "16 x 16. Licence of the data: Creative Commons Attribution 4.0 (UCI), BSD-3-Clause (scikit-learn)."
    )
    return Digits("digits", images, torch.from_numpy(labels).long(), origin)


def _idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """A gzipped idx file of bytes as an array."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"--data: cannot read {file}: {error}") from error
    if content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"--data: {file} is no idx file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


@dataclass(frozen=True)
class Denoiser:
    """How to build and call one kind of denoiser.

    conditional: whether it is told the class.
    no_class: the label that stands for any digit; a tenth of what it learns from has this one, so that its
        samples can be guided (Ho & Salimans, arXiv 2207.12598). None: it always needs a class.
    """

    build: Callable[[], nn.Module]
    conditional: bool = False
    no_class: int | None = None

    def noise(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """The noise that a model sees in images [n, 1, 16, 16]; timesteps and labels: [n]."""
        return model(noisy, timesteps, **({"class_labels": labels} if self.conditional else {})).sample


def unet() -> nn.Module:
    """A U-Net of two levels with attention at the lower one, 177 thousand parameters."""
    return _unet(None)


def unet_of_classes() -> nn.Module:
    """The same, told which digit to draw by an embedding that is added to that of the timestep."""
    return _unet(CLASSES)


def _unet(classes: int | None) -> nn.Module:
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=classes,
    )


def dit() -> nn.Module:
    """A diffusion transformer of 4 blocks on 2 x 2 patches, modulated by timestep and class.

    Modulation and output start at zero (adaLN-Zero: Peebles & Xie, ICCV 2023, section 3.2).
    """
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    modulations = [block.norm1.linear for block in model.transformer_blocks]
    for linear in (*modulations, model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


DENOISERS = {
    "unet": Denoiser(unet),
    "unet-classes": Denoiser(unet_of_classes, conditional=True),
    "dit": Denoiser(dit, conditional=True, no_class=CLASSES),
}


@dataclass
class Training:
    """A training under way; everything random in step s follows from the seed and s.

    The model trains in evaluation mode, which differs in one thing: diffusers' DiT does not hide labels,
    which it would do in each block on its own.
    """

    denoiser: Denoiser
    digits: Digits
    steps: int
    seed: int
    checkpoint: Path

    def run(self) -> tuple[Any, float, float]:
        """Train; the averaged model, the mean loss of the last 500 steps, and CPU-seconds."""
        torch.manual_seed(self.seed)
        self.model = self.denoiser.build().eval()
        self.average = deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_RATE, weight_decay=0.01)
        self.scheduler = DDIMScheduler()
        self.losses: list[float] = []
        self.seconds = 0.0
        self._restore()
        begin = time.process_time() - self.seconds
        for step in track(range(len(self.losses), self.steps), self.checkpoint.stem):
            self.losses.append(self._step(step))
            if (step + 1) % _SAVE_EVERY == 0:
                self.seconds = time.process_time() - begin
                self._save()
                loss = np.mean(self.losses[-_SAVE_EVERY:])
                say(f"step {step + 1}: loss {loss:.4f}, {self.seconds:.0f} CPU-s")
        return self.average, float(np.mean(self.losses[-500:])), time.process_time() - begin

    def _step(self, step: int) -> float:
        torch.manual_seed(self.seed * 1_000_003 + step)
        rate = _RATE * min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / self.steps)) / 2
        self.optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(self.digits.images), (_BATCH,))
        images, labels = 2 * self.digits.images[chosen] - 1, self.digits.labels[chosen]
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (_BATCH,))
        noise = torch.randn_like(images)
        if self.denoiser.no_class is not None:
            labels = labels.masked_fill(torch.rand(_BATCH) < _HIDDEN_LABELS, self.denoiser.no_class)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        loss = F.mse_loss(self.denoiser.noise(self.model, noisy, timesteps, labels), noise)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        with torch.no_grad():
            for kept, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(current, 1 - _AVERAGE)
        return loss.item()

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _restore(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        say(f"continuing at step {len(self.losses)} from {self.checkpoint}")


@torch.no_grad()
def sample(denoiser: Denoiser, model: nn.Module, count: int, seed: int) -> Tensor:
    """Images [count, 1, 16, 16] in [0, 1] by DDIM in 20 steps; classes 0 to 9 in turn."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(_SAMPLING_STEPS)
    images = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % CLASSES
    for timestep in scheduler.timesteps:
        noise = denoiser.noise(model, images, timestep.expand(count), labels)
        images = scheduler.step(noise, timestep, images).prev_sample
    return (images / 2 + 0.5).clamp(0, 1)


def train_denoiser(kind: str, digits: Digits, output: Path, steps: int, seed: int) -> None:
    """Train, save in diffusers' layout, and write the card."""
    denoiser = DENOISERS[kind]
    name = f"{digits.name}-{kind}"
    checkpoint = Path(tempfile.gettempdir()) / "train_denoiser" / f"{name}-{steps}-{seed}.pt"
    model, loss, seconds = Training(denoiser, digits, steps, seed, checkpoint).run()
    folder = output / name
    if isinstance(model, UNet2DModel):
        DDIMPipeline(model, DDIMScheduler()).save_pretrained(folder)
    else:
        model.save_pretrained(folder / "transformer")
        DDIMScheduler().save_pretrained(folder / "scheduler")
    classifier = load_classifier(output / f"{digits.name}-classifier")
    probabilities = classifier.probabilities(sample(denoiser, model, _SHOWN, seed))
    facts = {
        "network": f"{type(model).__name__}, {parameters(model):,} parameters",
        "data": digits.origin,
        "recipe": f"`tools/train_denoiser.py {kind} --steps {steps} --seed {seed}`, described in that file",
        "seconds": f"{seconds:.0f} CPU-seconds of one thread",
        "final loss": f"{loss:.4f} (mean squared error of the noise, last 500 steps)",
        "confidence": f"{probabilities.amax(1).mean():.3f}, the mean of the classifier's largest "
        f"probability for {_SHOWN} samples (DDIM, {_SAMPLING_STEPS} steps)",
    }
    if denoiser.conditional:
        right = probabilities.argmax(1) == torch.arange(_SHOWN) % CLASSES
        facts["obedience"] = f"{right.double().mean():.1%} of those samples show the digit asked for"
    write_card(folder, name, facts)
    checkpoint.unlink(missing_ok=True)


def train_classifier(digits: Digits, output: Path, seed: int) -> None:
    """Train on nine of ten images, measure on the others, save, and write the card."""
    torch.manual_seed(seed)
    begin = time.process_time()
    classifier = Classifier().train()
    held_out = torch.arange(len(digits.images)) % 10 == 9
    images, labels = digits.images[~held_out], digits.labels[~held_out]
    optimizer = torch.optim.Adam(classifier.parameters())
    batches = len(images) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=_EPOCHS * batches)
    for _ in track(range(_EPOCHS), "classifier"):
        for chosen in torch.randperm(len(images))[: batches * _BATCH].view(batches, _BATCH):
            moved = F.pad(images[chosen], (1, 1, 1, 1))
            top, left = torch.randint(3, (2,)).tolist()
            shown = torch.cat((moved[..., top : top + SIDE, left : left + SIDE], blotches(_BATCH // 4)))
            targets = torch.full((len(shown), CLASSES), 1 / CLASSES)
            targets[:_BATCH] = F.one_hot(labels[chosen], CLASSES).float()
            loss = F.cross_entropy(classifier(shown), targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - begin
    found = classifier.probabilities(digits.images[held_out])
    right = found.argmax(1) == digits.labels[held_out]
    name = f"{digits.name}-classifier"
    (output / name).mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), output / name / WEIGHTS)
    facts = {
        "network": f"ptq_diffusion.classifier, {parameters(classifier):,} parameters",
        "data": digits.origin,
        "recipe": f"`tools/train_denoiser.py classifier --seed {seed}`, described in that file",
        "seconds": f"{seconds:.0f} CPU-seconds of one thread",
        "final loss": f"{loss.item():.4f} (cross-entropy, last batch)",
        "accuracy": f"{right.double().mean():.1%} of {len(right)} images that it was not trained on",
        "confidence": f"{found.amax(1).mean():.3f}, the mean of its largest probability for those images; "
        f"{classifier.probabilities(blotches(1000)).amax(1).mean():.3f} for images without a digit",
    }
    write_card(output / name, name, facts)


def blotches(count: int) -> Tensor:
    """Images [count, 1, 16, 16] in [0, 1] without a digit: grain and clouds, of any contrast."""
    grain = torch.randn(count, 1, SIDE, SIDE)
    clouds = F.interpolate(torch.randn(count, 1, 5, 5), (SIDE, SIDE), mode="bicubic")
    share, contrast, brightness = torch.rand(3, count, 1, 1, 1)
    return (brightness + 2 * contrast * (share * grain + (1 - share) * clouds)).clamp(0, 1)


def parameters(model: nn.Module) -> int:
    """How many numbers a model has learnt."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_card(folder: Path, name: str, facts: dict[str, str]) -> None:
    """`card.md`: what the model is and how it came to be."""
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    (folder / "card.md").write_text("\n".join(lines), encoding="utf-8")
    say("\n".join(lines))


def main() -> None:
    """Read the command line and train."""
    kinds = ("classifier", *DENOISERS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=kinds, default=kinds, metavar="NAME")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=embedded.folder())
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        digits = mnist(chosen.data) if chosen.data else scikit_learn_digits()
        for kind in chosen.names:
            if kind == "classifier":
                train_classifier(digits, chosen.output, chosen.seed)
            else:
                train_denoiser(kind, digits, chosen.output, chosen.steps, chosen.seed)
    except PtqError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
