"""Tutorial 3: find what activates a latent, steer the model with it, and attribute a prediction to latents.

Run `make demo` first (or give another run's SAE): python docs/tutorials/3_steer_and_attribute.py runs/demo/sae
"""

# %% The model and the SAE
import sys
from pathlib import Path

import torch

from saepipe import SAE, HookedSAETransformer

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/sae"
if not Path(FOLDER).exists():
    sys.exit(f"{FOLDER} does not exist; run `make demo` first, or give the folder of an SAE")
TEXTS = ["GET /index.html HTTP/1.1", "Dear Sir or Madam,", "def add(a, b):", "Once upon a time", "POST /users HTTP/1.1"]

sae = SAE.load(FOLDER)
model = HookedSAETransformer.from_pretrained(sae.cfg.metadata.model_name)
hook = sae.cfg.metadata.hook_name

# %% The latent that tells two HTTP requests from the other texts
strongest = []
for text in TEXTS:
    _, cache = model.run_with_cache(text, names_filter=[hook])
    strongest.append(sae.encode(cache[hook])[0, 1:].max(0).values)
strength = torch.stack(strongest)  # [text, d_sae]
http = [number for number, text in enumerate(TEXTS) if "HTTP" in text]
others = [number for number in range(len(TEXTS)) if number not in http]
latent = int((strength[http].min(0).values - strength[others].max(0).values).argmax())
for text, value in zip(TEXTS, strength[:, latent], strict=True):
    print(f"latent {latent}: {float(value):6.2f}  {text}")

# %% Which tokens of a text it is active on
_, cache = model.run_with_cache(TEXTS[0], names_filter=[hook])
for word, value in zip(model.to_str_tokens(TEXTS[0]), sae.encode(cache[hook])[0, :, latent], strict=True):
    print(f"{word!r:>12} {float(value):6.2f}")

# %% Steering: its direction in the decoder, added at every step of generation
direction = sae.W_dec[latent]
amount = float(strength[:, latent].max())


def steer(activations: torch.Tensor, hook: object) -> torch.Tensor:
    """Add the direction to every position."""
    return activations + amount * direction


for name, hooks in {"as it is": [], "steered": [(hook, steer)]}.items():
    print(f"{name}: {model.generate('The', max_new_tokens=20, do_sample=False, fwd_hooks=hooks, verbose=False)!r}")

# %% Attribution: how much each latent adds to the logit of a next token, through its direction and the unembedding,
# whose columns have the final norm's weights folded in; what that norm divides by is the same for all latents.
prompt, target = "GET /index.html", " HTTP"
token = model.to_tokens(target, prepend_bos=False)[0, 0]
_, cache = model.run_with_cache(prompt, names_filter=[hook, "ln_final.hook_scale"])
features = sae.encode(cache[hook])[0, -1]
direct = features * (sae.W_dec @ model.W_U[:, token]) / cache["ln_final.hook_scale"][0, -1]
for number in direct.topk(5).indices.tolist():
    print(f"latent {number}: active at {float(features[number]):.2f}, adds {float(direct[number]):+.2f}")

# %% What later layers make of them counts too: the gradient of the logit with respect to each latent
acts = f"{hook}.hook_sae_acts_post"
kept = {}


def keep(activations: torch.Tensor, hook: object) -> torch.Tensor:
    """Keep the latents as they pass, for their gradient."""
    kept["features"] = activations
    activations.retain_grad()
    return activations


logits = model.run_with_hooks_with_saes(prompt, saes=[sae], fwd_hooks=[(acts, keep)], use_error_term=True)
logits[0, -1, token].backward()
effect = (kept["features"] * kept["features"].grad)[0, -1].detach()
for number in effect.topk(5).indices.tolist():
    print(f"latent {number}: {float(effect[number]):+.2f}")
