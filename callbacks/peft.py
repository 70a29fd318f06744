"""Any PEFT method on any LightningModule: PEFT owns the layers, Lightning the loop."""

from __future__ import annotations

import functools
import json
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import PeftConfig, PeftType
from torch import nn

from lightning_peft.adapters.configuration import as_config, from_json, to_json
from lightning_peft.adapters.injection import (
    adapters_of,
    configs_of,
    has_network,
    inject,
    load_adapter,
    network_name,
    same_on_all_ranks,
)
from lightning_peft.checkpoint import resumed_callback_state
from lightning_peft.delta import base_digests, check_on_load, make_delta
from lightning_peft.export import network_record
from lightning_peft.quantization import keep_differentiable, quantization_settings, quantize
from lightning_peft.when_built import forget, when_built


class PEFT(L.Callback):
    """Puts any method of PEFT on the network inside any LightningModule, in place, before optimizers are made.

    The base is frozen and the adapter trains; for classification the head trains as well, as PEFT has it. Checkpoints
    are Lightning's own (`DeltaCheckpoint` writes them without the base) and `lightning-peft export` makes of them a
    folder that plain `peft` or transformers loads. `attach(module)` does the same without a Trainer.

    Args:
        config: A `PeftConfig` (in YAML with class_path and init_args), or a dictionary with `peft_type` and the
            method's arguments, such as `{peft_type: LORA, r: 8, target_modules: all-linear}`.
        adapter: Folder or hub name of an adapter to start from; its config is used and its weights go on training.
        quantization_config: Arguments of transformers' BitsAndBytesConfig to hold the base in 4 or 8 bits, such as
            `{load_in_4bit: true, bnb_4bit_quant_type: nf4}`. A quantised base is never in a checkpoint.
        modules_to_save: Names of modules that train whole, besides the config's own.
        autocast_adapter_dtype: Hold the adapter in fp32 where the network is in half precision.
        adapter_name: Name of the adapter; two of these callbacks need two names.
        network: Name of the network inside the module, needed only where it holds more than one.

    Raises:
        ValueError: The configuration does not fit (unknown names come with the closest ones), or the Trainer has
            something that cannot work with adapters; the message says what to do.
        ImportError: `quantization_config` is given and bitsandbytes is not there.
    """

    def __init__(
        self,
        config: PeftConfig | dict[str, Any] | None = None,
        adapter: str | None = None,
        quantization_config: dict[str, Any] | None = None,
        modules_to_save: list[str] | None = None,
        autocast_adapter_dtype: bool = True,
        adapter_name: str = "default",
        network: str | None = None,
    ) -> None:
        if (config is None) == (adapter is None):
            raise ValueError("PEFT takes a config (a new adapter) or adapter=FOLDER (an existing one), one of the two.")
        self.config = as_config(config) if config is not None else None
        self.adapter = adapter
        self.quantization_config = quantization_config
        if quantization_config is not None:
            quantization_settings(quantization_config)
        self.modules_to_save = modules_to_save
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.adapter_name = adapter_name
        self.network = network
        self._state: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}
        self._trainer: L.Trainer | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(adapter_name=self.adapter_name)

    def state_dict(self) -> dict[str, Any]:
        """The adapter's config and the network's class and config, as JSON: what `export` builds them from."""
        return self._state

    # -- insertion ------------------------------------------------------------------------------------------------

    def attach(self, module: L.LightningModule) -> nn.Module:
        """Puts the adapter into `module`, once; a second call changes nothing.

        Args:
            module: A LightningModule whose network is built.

        Returns:
            The network with its adapter.
        """
        path = network_name(module, self.network)
        if self.quantization_config is not None:
            quantize(module.get_submodule(path), self.quantization_config)
        keep_differentiable(module.get_submodule(path))  # it may have come quantised
        config = self._config()
        fresh = to_json(config) != adapters_of(module.get_submodule(path)).get(self.adapter_name)
        options = (self.adapter_name, path, self.modules_to_save, self.autocast_adapter_dtype)
        network: Any = inject(module, config, *options)
        if fresh and self.adapter is not None and not self._resumed:
            load_adapter(network, self.adapter, self.adapter_name)
        if fresh and self._trainer is not None and self._trainer.world_size > 1:
            same_on_all_ranks(network, self._trainer.strategy.broadcast)
        self._state = {
            "adapter_name": self.adapter_name,
            "config": to_json(configs_of(network)[self.adapter_name]),
            "network": json.dumps(network_record(module, path)),
        }
        if fresh:
            self._say(network)
        return network

    def _config(self) -> PeftConfig:
        if self.config is None and self._resumed:  # the folder may be gone; the weights come from the checkpoint
            self.config = from_json(self._resumed["config"])
        elif self.config is None:
            loaded = PeftConfig.from_pretrained(str(self.adapter))
            loaded.inference_mode = False
            if getattr(loaded, "prefix_projection", False):
                loaded.prefix_projection = False  # the folder holds what the projection made
            if loaded.peft_type == PeftType.P_TUNING:
                raise ValueError(
                    f"adapter={self.adapter!r} is P-tuning's, whose encoder is not in the folder, so it cannot go on "
                    "training: start a new one with config={'peft_type': 'P_TUNING', ...}."
                )
            self.config = from_json(to_json(loaded))
        return self.config

    def _say(self, network: nn.Module) -> None:
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        total = sum(p.numel() for p in network.parameters())
        kind = configs_of(network)[self.adapter_name].peft_type.value
        rank_zero_info(f"PEFT: {kind} adapter {self.adapter_name!r}: {trained:,} of {total:,} parameters train.")

    # -- Lightning ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._refuse(trainer)
        check_on_load(trainer)
        if self.quantization_config is not None:
            _keep_base_out(trainer)
        self._trainer = trainer
        if self.adapter is not None:
            self._resumed = resumed_callback_state(trainer, self.state_key) or {}
        when_built(pl_module, self.attach, has_network)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        forget(pl_module)
        self._trainer = None

    def _refuse(self, trainer: L.Trainer) -> None:
        from lightning.pytorch.plugins.precision import BitsandbytesPrecision
        from lightning.pytorch.strategies import ModelParallelStrategy
        from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                f"PEFT does not work with {type(trainer.strategy).__name__}(start_method=...) in spawned, forked or "
                "notebook processes: after fit the module in this process would have no adapter. Use strategy='ddp'."
            )
        if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
            raise ValueError(
                "BitsandbytesPrecision would quantise the adapters as well: leave it out and hold the base in 4 bits "
                "with PEFT(quantization_config={'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'})."
            )
        if self.quantization_config is not None and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "quantization_config does not work under ModelParallelStrategy (FSDP2), which cannot shard packed "
                "4-bit weights: use strategy='ddp', or leave quantization_config out."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
                raise ValueError(
                    f"{type(other).__name__} stands before PEFT in callbacks and would average a network without "
                    "adapters: put PEFT first."
                )


def _keep_base_out(trainer: L.Trainer) -> None:
    """Lets the trainer's strategy leave a quantised base out of every checkpoint, whoever writes it."""
    strategy = trainer.strategy
    if "save_checkpoint" in strategy.__dict__:
        return
    original = strategy.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        module = trainer.lightning_module
        make_delta(checkpoint, base_digests(module, quantised_only=True), module)
        original(checkpoint, *args, **kwargs)

    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
