"""Tutorial 3: find the latent of some texts, steer the model with it, and attribute a prediction to latents.

Run `make demo` first (or give another run's SAE): python docs/tutorials/3_steer_and_attribute.py runs/demo/sae
"""

# %% The model and the SAE
import sys
from pathlib import Path

from saepipe import SAE, HookedSAETransformer
from saepipe.ablation import ablation_effects
from saepipe.attribution import by_gradient, direct
from saepipe.reading import Texts
from saepipe.separation import Summary, separate
from saepipe.steering import Steer
from saepipe.typical import Typical

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "runs/demo/sae"
if not Path(FOLDER).exists():
    sys.exit(f"{FOLDER} does not exist; run `make demo` first, or give the folder of an SAE")
HEBREW = [
    "הילד קנה את האישה כי רחל הלכה בזהירות.",
    "ביפו יש מורה קטן ושכנה גדולה.",
    "היום, הדירה ראתה את יוסף והלכה ביפו.",
    "איזה רופא יפה! הוא חיכה לאט.",
]
OTHERS = [
    "GET /index.html HTTP/1.1",
    "Dear Sir or Madam,",
    "def add(a, b):",
    "Once upon a time",
    "POST /users HTTP/1.1",
]

sae = SAE.load(FOLDER)
model = HookedSAETransformer.from_pretrained(sae.cfg.metadata.model_name)
hook = sae.cfg.metadata.hook_name

# %% The latents that best tell Hebrew from other texts, by their mean activation in each (take many texts of your own)
a, b = (Summary.measure(model, sae, Texts(model, texts).batches(8)) for texts in (HEBREW, OTHERS))
found = separate(a.values, b.values)
latents = found.best(5)
for number in latents:
    low, high = found.auroc_interval[:, number].tolist()
    larger = float(found.difference[number])
    print(f"latent {number}: AUROC {float(found.auroc[number]):.2f} [{low:.2f}, {high:.2f}], {larger:+.2f} in the mean")

# %% Which tokens of a text it is active on
_, cache = model.run_with_cache(HEBREW[0], names_filter=[hook])
for word, value in zip(model.to_str_tokens(HEBREW[0]), sae.encode(cache[hook])[0, :, latents[0]], strict=True):
    print(f"{word!r:>12} {float(value):6.2f}")

# %% Steering: twice the typical activation of each of the five, added at every step of generation
texts = Texts(model, [*HEBREW, *OTHERS])
typical = Typical.measure(model, sae, texts.batches(8))
steer = Steer(sae, dict.fromkeys(latents, 2.0), typical=typical)
for name, hooks in {"as it is": [], "steered": steer.fwd_hooks}.items():
    print(f"{name}: {model.generate('The', max_new_tokens=20, fwd_hooks=hooks, seed=0)!r}")

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

# %% What the model really loses by it: the rise of the cross-entropy without a latent
for lost in ablation_effects(model, sae, latents, texts.batches(8)):
    of = f"{lost.active} of {lost.tokens} tokens"
    print(f"without latent {lost.latent}: {lost.ce_increase:+.4f} nats per token, from {of}")
