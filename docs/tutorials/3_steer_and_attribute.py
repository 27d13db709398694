"""Tutorial 3: find what activates a latent, steer the model with it, and attribute a prediction to latents.

Run `make demo` first (or give another run's SAE): python docs/tutorials/3_steer_and_attribute.py runs/demo/sae
"""

# %% The model and the SAE
import sys
from pathlib import Path

import torch

from saepipe import SAE, HookedSAETransformer
from saepipe.ablation import ablation_effects
from saepipe.attribution import by_gradient, direct
from saepipe.reading import Texts
from saepipe.steering import Steer
from saepipe.typical import Typical

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

# %% Steering: three times its typical activation, added at every step of generation
typical = Typical.measure(model, sae, Texts(model, TEXTS).batches(8))
steer = Steer(sae, {latent: 3.0}, typical=typical)
for name, hooks in {"as it is": [], "steered": steer.fwd_hooks}.items():
    print(f"{name}: {model.generate('The', max_new_tokens=20, do_sample=False, fwd_hooks=hooks, verbose=False)!r}")

# %% Attribution: what each latent adds to the logit of a next token through its direction and the unembedding alone
prompt, target = "GET /index.html", " HTTP"
parts = direct(model, sae, prompt, target)
for number in parts.latents.topk(5).indices.tolist():
    active, adds = float(parts.activations[number]), float(parts.latents[number])
    print(f"latent {number}: active at {active:.2f}, adds {adds:+.2f}")
print(f"all latents {float(parts.latents.sum()):+.2f}, the SAE's bias {parts.bias:+.2f}, its error {parts.error:+.2f}")
print(f"later layers {parts.others:+.2f}; in all {parts.total:.3f}, and the logit is {parts.logit:.3f}")

# %% What later layers make of them counts too, also of those at earlier positions: integrated gradients
effect = by_gradient(model, sae, prompt, target, steps=16)
words = model.to_str_tokens(prompt)
for number in effect.latents.flatten().topk(5).indices.tolist():
    position, which = divmod(number, sae.d_sae)
    print(f"latent {which} on {words[position]!r}: {float(effect.latents[position, which]):+.2f}")
print(f"in all {effect.total:.2f}; the logit falls by {effect.logit - effect.without:.2f} without any latent")

# %% What the model really loses by it: the rise of the cross-entropy without the latent
for lost in ablation_effects(model, sae, [latent], Texts(model, TEXTS).batches(8)):
    print(
        f"without latent {latent}: {lost.ce_increase:+.4f} nats per token, from {lost.active} of {lost.tokens} tokens"
    )
