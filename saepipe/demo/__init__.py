"""The embedded default: a small language model and the labelled corpus that it was trained on.

The whole pipeline runs on it offline, and the features of a sparse autoencoder can be checked against the corpus's
ground truth (`saepipe.demo.corpus`). The model's measured losses are in `MODEL_DIR / "training.json"`.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The folder of the model: `AutoModelForCausalLM.from_pretrained(MODEL_DIR)`, and its tokenizer."""
