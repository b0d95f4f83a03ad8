"""Trains a dictionary on traced activations with SAELens' trainer: BatchTopK, saved as JumpReLU.

The work folder holds ``checkpoint/`` (SAELens' training weights and trainer state), so that a killed run can
resume: batch n depends only on the seed and n.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from discovery.data.activations import TraceReader, shuffled_batches
from discovery.errors import DiscoveryError
from discovery.frozen_model import hook_name
from discovery.jobs.checksummed_file import REMEDY
from discovery.jobs.checksummed_folder import checksummed_folder, verify_checksummed_folder
from discovery.jobs.progress import meter
from discovery.jobs.stopping import stoppable
from discovery.jobs.whole_file import unwritten, write_json
from discovery.jobs.workers import ALONE, Team
from discovery.sae.train_settings import TrainSettings
from discovery.sae.train_together import check_alike, share_gradients, share_statistics
from interpretops.artifacts.dictionary.saelens import load_saelens
from interpretops.files.atomic_folder import recover_folder
from interpretops.steering.dictionary_features import DictionaryFeatures

CHECKPOINT = "checkpoint"
WEIGHTS = "sae_weights.safetensors"


def train(
    reader: TraceReader,
    settings: TrainSettings,
    work: Path,
    checkpoint_steps: int = 200,
    team: Team = ALONE,
) -> Any:
    """Train, or resume training, and return SAELens' trainer with the finished dictionary in ``.sae``.

    In a team, each worker takes its part of every batch, and all take the same step along the mean gradient.
    """
    settings = settings.filled(reader.record)
    torch.manual_seed(settings.seed)
    trainer = _trainer(reader, settings)
    checkpoint = work / CHECKPOINT
    identity = _identity(reader, settings)
    with team.agreeing():
        if team.first:
            recover_folder(checkpoint)
    with team.agreeing():
        if checkpoint.exists():
            _restore(trainer, checkpoint, identity)
    share_gradients(list(trainer.sae.parameters()), team)
    source = shuffled_batches(reader.activations, settings.batch, settings.seed, trainer.n_training_steps)
    steps = trainer.cfg.total_training_steps
    told = "sae-train", steps * settings.batch, "tokens", trainer.n_training_steps * settings.batch
    with stoppable() as stop, meter(*told, shown=team.first) as progress:
        for batch in source:
            if trainer.n_training_steps >= steps:
                break
            output = trainer.step(batch.chunk(team.count)[team.rank])
            share_statistics(trainer, team)
            trainer.n_training_steps += 1
            note = f"mse {output.losses['mse_loss'].item():.4f}, dead {int(trainer.dead_neurons.sum())}"
            progress.advance(len(batch), note if trainer.n_training_steps % 10 == 0 else "")
            due = trainer.n_training_steps % checkpoint_steps == 0 or trainer.n_training_steps == steps
            if due or any(team.gather(stop.asked is not None)):
                with team.agreeing():
                    check_alike(trainer, team)
                    if team.first:
                        _save(trainer, checkpoint, identity)
                    stop.check(f"step {trainer.n_training_steps:,} of {steps:,} is saved in {checkpoint}")
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.set_final_sae_metadata()
    return trainer


def _identity(reader: TraceReader, settings: TrainSettings) -> dict[str, Any]:
    return asdict(settings.filled(reader.record)) | {
        "shards": [entry["sha256"] for entry in reader.record["shards"]]
    }


def train_digest(reader: TraceReader, settings: TrainSettings) -> str:
    """16 hex digits that identify a training run by its trace and settings."""
    return hashlib.sha256(json.dumps(_identity(reader, settings)).encode()).hexdigest()[:16]


def _trainer(reader: TraceReader, settings: TrainSettings) -> Any:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    width = reader.activations.shape[1]
    assert settings.tokens is not None
    steps = settings.tokens // settings.batch
    metadata = SAEMetadata(
        model_name=reader.record["model"]["name"],
        hook_name=hook_name(reader.layer),
        context_size=reader.record["settings"]["context"],
        prepend_bos=False,
    )
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=width,
            d_sae=settings.width,
            k=settings.k,
            normalize_activations="expected_average_only_in",
            metadata=metadata,
        )
    )
    sample = reader.activations[torch.randperm(len(reader.activations))[:20_000]].float()
    scaling = width**0.5 / float(sample.norm(dim=-1).mean())
    with torch.no_grad():
        sae.b_dec.data = (sample.mean(0) * scaling).to(sae.b_dec.dtype)
    config = SAETrainerConfig(
        total_training_samples=steps * (settings.batch // settings.workers),
        train_batch_size_samples=settings.batch // settings.workers,
        lr=settings.learning_rate,
        lr_warm_up_steps=min(100, steps // 10),
        lr_decay_steps=steps // 5,
        lr_end=settings.learning_rate / 10,
        dead_feature_window=min(200, max(steps // 4, 1)),
        feature_sampling_window=10 * steps,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    trainer.activation_scaler.scaling_factor = scaling
    return trainer


def _save(trainer: Any, checkpoint: Path, identity: dict[str, Any]) -> None:
    try:
        with checksummed_folder(checkpoint, identity) as fresh:
            trainer.save_trainer_state(fresh)
            save_file({k: v.contiguous() for k, v in trainer.sae.state_dict().items()}, fresh / WEIGHTS)
    except (RuntimeError, SafetensorError) as error:  # as which torch reports a full disk
        raise unwritten(checkpoint, error) from error


def _restore(trainer: Any, checkpoint: Path, identity: dict[str, Any]) -> None:
    verify_checksummed_folder(checkpoint, identity)
    try:
        trainer.sae.load_state_dict(load_file(checkpoint / WEIGHTS))
        trainer.load_trainer_state(checkpoint)  # torch.load, which since 2.6 unpickles plain tensors only
    except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError, SafetensorError) as error:
        # Sealed by the same identity, and yet of another shape: written by another version of this program.
        raise DiscoveryError(f"{checkpoint}: does not fit this training ({error}); {REMEDY}") from error


def save_dictionary(trainer: Any, folder: Path) -> None:
    """Write SAELens' inference layout (cfg.json, sae_weights.safetensors), weights in float16."""
    trainer.sae.save_inference_model(folder)
    weights = {k: v.half().contiguous() for k, v in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    config = json.loads((folder / "cfg.json").read_bytes())
    write_json(folder / "cfg.json", config | {"dtype": "float16"})


def reconstruction(folder: Path) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The dictionary in ``folder``, as it lies on disk, as a function for `splice_metrics`."""
    features = DictionaryFeatures(load_saelens(folder, folder / WEIGHTS))

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        active = features.encode(x)
        return active, features.decode(active)

    return reconstruct
