"""Tutorial 1: open an SAE, run a language model with it, and see what its latents say.

Run `make demo` first (or give another run's SAE): python docs/tutorials/1_load_and_analyse.py runs/demo/sae
Each `# %%` begins a cell, for editors that run scripts as notebooks.
"""

# %% The model and the SAE
import sys
from pathlib import Path

import torch

from saepipe import SAE, HookedSAETransformer, neuronpedia, pretrained

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/sae"
if not Path(FOLDER).exists():
    sys.exit(f"{FOLDER} does not exist; run `make demo` first, or give the folder of an SAE")
PROMPT = "GET /index.html HTTP/1.1"

# A published SAE opens by its names, and brings its layer: SAE.from_pretrained("gpt2-small-res-jb",
# "blocks.8.hook_resid_pre") is for HookedSAETransformer.from_pretrained("gpt2-small"). Here it is the demo's own.
print(pretrained.list("gpt2-small res-jb resid_pre")[8].neuronpedia_id)
sae = SAE.load(FOLDER)
model = HookedSAETransformer.from_pretrained_no_processing(sae.cfg.metadata.model_name)
hook = sae.cfg.metadata.hook_name
print(f"{sae.cfg.architecture}, {sae.cfg.d_sae} latents, on {hook} of {sae.cfg.metadata.model_name}")

# %% Activations, and what the SAE makes of them
logits, cache = model.run_with_cache(PROMPT)
activations = cache[hook]  # [batch, seq, d_in]
features = sae.encode(activations)
reconstruction = sae.decode(features)
words = model.to_str_tokens(PROMPT)

# Position 0 is left out of figures: its activations are an order of magnitude larger, whatever the text.
error = (activations - reconstruction)[0, 1:].square().sum(-1)
size = activations[0, 1:].square().sum(-1)
print(f"error over size: {float((error / size).mean()):.3f}")
print(f"latents active per token: {(features[0, 1:] > 0).sum(-1).tolist()}")

# %% The strongest latents of every position
top = features[0].topk(3, dim=-1)
for word, strengths, latents in zip(words, top.values, top.indices, strict=True):
    print(f"{word!r:>12}", [(int(latent), round(float(f), 2)) for latent, f in zip(latents, strengths, strict=True)])

# %% What the model does with the reconstruction in place of its own activations
with torch.no_grad():
    clean = model(PROMPT, return_type="loss")
    spliced = model.run_with_saes(PROMPT, saes=[sae], return_type="loss")
    exact = model.run_with_saes(PROMPT, saes=[sae], use_error_term=True, return_type="loss")
print(f"loss {float(clean):.3f}; with the SAE {float(spliced):.3f}; with its error added back {float(exact):.3f}")
assert torch.allclose(clean, exact, atol=1e-3)

# %% Looking a latent up where others have described it
print(neuronpedia.page("gpt2-small/8-res-jb", 1234))
