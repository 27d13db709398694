"""A pretrained language model on disk or on the hub: configuration, tokenizer, and the weights when asked for."""

import copy
import hashlib
import json
import logging
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saepipe import hub
from saepipe.config import ModelConfig
from saepipe.demo import MODEL_DIR
from saepipe.errors import UserError, explained_memory
from saepipe.placement import Placement

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 4096


class ModelFiles:
    """A causal language model in a folder or on the hub; use `open`.

    Reading these files takes a moment, so that whatever is wrong with them costs no download and no loading of weights.
    """

    def __init__(self, config: ModelConfig, source: str) -> None:
        """Read the configuration and the tokenizer from a folder or a hub id."""
        self.name = config.name
        self.source = source
        """Folder or hub id that everything is loaded from."""
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._wanted = config
        self._options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        self.config = self._read_config()
        self._refuse_other_kinds()
        self.tokenizer = self._read_tokenizer()

    @classmethod
    def open(cls, config: ModelConfig) -> "ModelFiles":
        """Find a model.

        Args:
            config: The model group of the configuration.

        Raises:
            UserError: The model is missing, out of reach, gated or no causal language model.
        """
        if config.revision is not None and (config.name == "demo" or hub.local(config.name) is not None):
            raise UserError(
                f"model.revision={config.revision} has no meaning for model.name={config.name}, which is not on the "
                "hub; leave model.revision out"
            )
        if config.name == "demo":
            return cls(config, str(MODEL_DIR))
        if (folder := hub.local(config.name)) is not None:
            return cls(config, str(folder))
        hub.check(config.name, "model", config.revision, key="model.name")
        return cls(config, config.name)

    @property
    def text_config(self) -> "PretrainedConfig":
        """The part of the configuration that describes the decoder."""
        return self.config.get_text_config()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, for a store's plan: another identity may give other values."""
        folder = Path(self.source)
        with self.explained("damaged weights"):
            weights = _fingerprint(folder) if folder.is_dir() else None
        return {
            "name": self.name if self.name == "demo" else self.source,
            "revision": getattr(self.config, "_commit_hash", None) or self._wanted.revision,
            "weights": weights,
            "dtype": self._wanted.dtype,
            "compatibility_mode": self._wanted.compatibility_mode,
        }

    @cached_property
    def skeleton(self) -> "PreTrainedModel | None":
        """The model's modules without weights (on the meta device); None where its code cannot do without them."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    copy.deepcopy(self.config), dtype=self.dtype, trust_remote_code=self._wanted.trust_remote_code
                ).eval()
        except Exception as error:  # loading will say in words what is wrong, if anything is
            log.debug("no skeleton of %s: %s", self.name, hub.fault(error))
            return None

    def load(self, placement: Placement) -> "PreTrainedModel":
        """Load the weights, for inference.

        Raises:
            UserError: Weights are missing, damaged or of another model, or there is not enough memory.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        if not sys.stderr.isatty():  # its bar over the weights is nothing for a log
            transformers_logging.disable_progress_bar()
        with self.explained("no weights of a causal language model that fit its config.json"):
            model, found = AutoModelForCausalLM.from_pretrained(
                self.source,
                config=self.config,
                dtype=self.dtype,
                output_loading_info=True,
                **self._options,
                **placement.loading(),
            )
            if missing := sorted(found["missing_keys"]):  # transformers would make them up at random
                raise UserError(
                    f"model.name={self.name} lacks {len(missing)} of the model's weights, e.g. {missing[0]}; give a "
                    "folder that save_pretrained wrote"
                )
            self._check_fits(getattr(model, "hf_device_map", {}), placement)
            if placement.device_map is None:
                model = model.to(placement.device)
            return model.eval().requires_grad_(False)

    def _check_fits(self, device_map: dict[str, Any], placement: Placement) -> None:
        """Refuse a model that transformers could not spread over the GPUs alone."""
        away = [module for module, device in device_map.items() if str(device) in ("cpu", "disk")]
        if away and placement.gpus:
            cure = "" if self._wanted.dtype != "float32" else " or model.dtype=bfloat16"
            raise UserError(
                f"model.name={self.name} does not fit the GPUs of model.n_devices={len(placement.gpus)} ({away[0]} and "
                f"what follows found no place); give more GPUs{cure}"
            )

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Word whatever transformers, safetensors, torch or a model's own code raise at what they cannot read.

        Args:
            what: What the model has then.
        """
        try:
            with explained_memory(f"loading model.name={self.name}", model__dtype="bfloat16"):
                yield
        except UserError:
            raise
        except Exception as error:
            raise self._unusable(error, what) from error

    def _unusable(self, error: Exception, what: str) -> UserError:
        """Word a loading error."""
        if "trust_remote_code" in str(error) and not self._wanted.trust_remote_code:
            return UserError(
                f"model.name={self.name} brings its own code; set model.trust_remote_code=true if you trust it"
            )
        if hub.offline() and not Path(self.source).exists():
            return hub.out_of_reach(self.name, "model", hub.fault(error), key="model.name")
        return UserError(f"model.name={self.name} has {what}; give another Hugging Face model ({hub.fault(error)})")

    def _read_config(self) -> "PretrainedConfig":
        from transformers import AutoConfig

        with self.explained("no readable config.json"):
            return AutoConfig.from_pretrained(self.source, **self._options)

    def _refuse_other_kinds(self) -> None:
        """Refuse what transformers would not load as a language model, or would let attend to the tokens ahead."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        config, kind = self.config, type(self.config)
        trusted = self._wanted.trust_remote_code
        own_code = trusted and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        decodes = getattr(config, "is_decoder", False) or config.is_encoder_decoder
        encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not decodes
        if not own_code and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING or encoder):
            raise UserError(
                f"model.name={self.name} is no causal language model (its config.json describes "
                f"{'an encoder, ' if encoder else ''}model_type={config.model_type}); give one such as GPT-2 or Llama"
            )

    def _read_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        with self.explained("no readable tokenizer (save one there with save_pretrained)"):
            tokenizer = AutoTokenizer.from_pretrained(self.source, **self._options)
            # transformers makes up an empty one without files
            if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
                raise ValueError("its vocabulary is empty")
        return tokenizer


def _fingerprint(folder: Path) -> str:
    """Hash a model folder: the configuration, and of every weight its name, shape, first and last 4 KiB.

    Reading all of a large model would take as long as loading it; training a model changes both ends of its weights.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError(f"{path.name} is damaged")
            header = file.read(size)
            digest.update(header)
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    for place in (begin, max(begin, end - _SAMPLE_BYTES)):
                        file.seek(8 + size + place)
                        digest.update(file.read(min(end - place, _SAMPLE_BYTES)))
    for path in sorted(folder.glob("*.bin")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
