# %% [markdown]
# # 12. From one word to a sentence
#
# A classifier says one word of a list: "seven". It cannot say "three seven one", unless somebody
# lists all thousand strings as classes, and it can never say "a small red star" of a thing that
# nobody listed. **Open vocabulary**: say a *sentence*, word by word. A CNN looks, an RNN tells.
# This tutorial goes from the one to the other: a CNN learns one-word labels, is frozen, and an RNN
# learns to make sentences of what it sees; then both learn together to say what they have never
# seen.

# %%
import itertools
from pathlib import Path

import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import nn, optim, transfer
from minidl.attack import deployed
from minidl.captioning import (
    Captioner,
    Encoder,
    ShowAttend,
    Vocabulary,
    caption_loader,
    convolutions,
    metrics,
)
from minidl.captioning.decoding import beam_search, greedy
from minidl.captioning.train import Annotated, draw_attention
from minidl.data import DataLoader, Dataset, Digits, DigitStrings, ShapeScenes
from minidl.data.augment import RandomAffine
from minidl.optim.lr_scheduler import OneCycleLR

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)
minidl.manual_seed(0)

# %% [markdown]
# ## One word
#
# The classifier of the first lecture: convolutions, then a linear layer that gives one score for
# each of ten words. Its training loop serves to the end: whatever goes in and whatever comes out,
# the scores of the right words are pushed up.


# %%
def learn(model, loader, epochs, lr=3e-3):
    optimizer = optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    scheduler = OneCycleLR(optimizer, lr, total_steps=epochs * len(loader) + 1)
    model.train()
    for _ in range(epochs):
        for inputs, words in loader:
            loss = F.cross_entropy(model(inputs), words)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    model.eval()


cnn = convolutions((32, 64, 128), in_channels=1)  # 8×8 pixels -> 2×2 places
classifier = nn.Sequential(*cnn, nn.Dropout(0.5), nn.Flatten(), nn.Linear(128 * 2 * 2, 10))
digits = Digits(transform=RandomAffine(10, (0.1, 0.1)))
learn(classifier, DataLoader(digits, 64, shuffle=True), 40)

with deployed(classifier), minidl.no_grad():
    images, labels = next(iter(DataLoader(Digits(train=False), 360)))
    one_word = (classifier(images).argmax(dim=1) == labels).float().mean().item()
print(f"one word: {100 * one_word:.1f} % of other writers' digits are right")
assert one_word > 0.93

# %% [markdown]
# ## A sentence is a chain of words
#
# Three digits stand side by side, and the caption is "three seven one". As classes these would be
# a thousand; with four digits, ten thousand. But a sentence has parts, and so has its probability
# (Vinyals et al. 2015, equation 2):
#
#     p(three seven one | image) = p(three | image)
#                                · p(seven | three, image)
#                                · p(one | three seven, image)
#
# Each factor is a classifier of *one* word again: its input is the image, and what was said so far,
# which an RNN remembers. A special word, `<bos>`, begins a sentence, another, `<eos>`, ends it.

# %%
strings, unseen = DigitStrings(length=3000), DigitStrings(train=False, length=500)
vocabulary = Vocabulary.build(itertools.chain(*strings.captions))
caption = strings.captions[0][0]
print(f"{caption!r} becomes {vocabulary.encode(caption)}; {vocabulary}")
loader = caption_loader(strings, vocabulary, 64, shuffle=True)
batch, next_words = next(iter(loader))
print("images", batch.images.shape, "words that go in", batch.words.shape,
      "words that come out", next_words.shape)  # fmt: skip

# %% [markdown]
# ## The CNN is frozen: it has learned to see already
#
# The convolutions of the classifier, without its last layer, leave a grid of 2×6 *annotation
# vectors* for a string: what there is in each place. They shall stay as they are. Nothing is lost
# thereby, and much is saved: the vectors of all images are computed once, and an epoch costs the
# decoder only. This is what the decoder does at every step:

# %%
print(minidl.source(ShowAttend.advance))

# %% [markdown]
#
# The control is the same CNN with random weights, frozen too. If it did as well, the decoder would
# do the work, and freezing would mean nothing.


# %%
def tell_strings(eye):
    minidl.manual_seed(1)
    decoder = ShowAttend(vocabulary, features=128 + 2, hidden=128, embedding=64, dropout=0.5)
    model = Captioner(Encoder(eye), decoder)
    transfer.freeze(model, "encoder")
    seen = Annotated(model, strings)  # annotation vectors (12, 130) in place of images
    learn(model, caption_loader(seen, vocabulary, 64, shuffle=True), 10)
    return model


model = tell_strings(cnn)
report = metrics.evaluate(model, unseen)
control = metrics.evaluate(tell_strings(convolutions((32, 64, 128), in_channels=1)), unseen)
learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{learning:,} of {sum(p.numel() for p in model.parameters()):,} parameters learn")
print(f"strings that are right word for word: {100 * report.exact:.1f} %")
print(f"  if the three words failed as often as the one: {100 * one_word**3:.1f} %")
print(f"  the images permuted (a model that does not look): {100 * report.shuffled_exact:.1f} %")
print(f"  a CNN that learned nothing: {100 * control.exact:.1f} %")
assert report.exact > 0.8 > 0.4 > control.exact and report.shuffled_exact <= 0.01

# %% [markdown]
# ## Where does it look?
#
# Before every word the decoder chooses where to look: each place gets a weight α, the weights of a
# step add up to one, and their weighted mean of annotation vectors is what it sees (Xu et al. 2015,
# equations 4 to 6). Nobody told it to read from left to right. It found out, because the words come
# in that order.

# %%
image = minidl.tensor(unseen[3][0][None])
((said, *_),) = model.hypotheses(image, beam=3)
(maps,) = model.attention(image, [said.tokens])
words = [vocabulary.tokens[token] for token in said.tokens]
print(f"{' '.join(words)!r} is said of {unseen.captions[3]}")
draw_attention(unseen[3][0], words, maps, FIGURES / "12_reading.png")

looks = model.attention(minidl.tensor(np.stack([unseen[i][0] for i in range(100)])),
                        [c[0] for c in unseen.captions[:100]])  # fmt: skip
column = np.tile(np.arange(6), 2)  # of each of the 2×6 places
where = np.mean([maps @ column for maps in looks], axis=0)
print("mean column of the grid that it looks at, by word:", where[:3].round(2))
assert where[0] + 1 < where[1] and where[1] + 1 < where[2]

# %% [markdown]
# ![what it looks at, word by word](../runs/tutorials/12_reading.png)
#
# ## The likeliest word is not the likeliest sentence
#
# `greedy` says the likeliest word at each step. It cannot take a word back. A toy: after `<bos>`, A
# is likelier than B (0.6 to 0.4), but what follows A is a guess among four, and what follows B is
# nearly certain. `beam_search` keeps several beginnings, and finds the better sentence.

# %%

A, B = 2, 3  # 0 is <bos>, 1 is <eos>
tree = {(): {A: 0.6, B: 0.4}, (A,): dict.fromkeys((2, 3, 4, 5), 0.25), (B,): {4: 0.9, 5: 0.1}}


class Toy:
    """A language of trees: the state of a sentence is what was said so far."""

    def step(self, words, state):
        state = [(*s, int(w)) if w else s for s, w in zip(state, words.numpy())]
        p = [[tree.get(s, {1: 1.0}).get(w, 1e-9) for w in range(6)] for s in state]
        return minidl.tensor(np.log(p)), state

    def select(self, state, rows):
        return [state[row] for row in rows]


(first,) = greedy(Toy(), [()], 1, bos=0, eos=1)
((best, *_),) = beam_search(Toy(), [()], 1, bos=0, eos=1, beam=2)
for name, found in (("greedy", first), ("beam", best)):
    print(f"{name:7} {found.tokens}: probability {np.exp(found.log_likelihood):.2f}")
assert first.tokens[0] == A and best.tokens[0] == B

# %% [markdown]
# ## What nobody has ever said
#
# Now without a frozen CNN: encoder and decoder learn together, from pictures of a coloured shape
# with sentences like "a small red star". Some pairs of colour and shape (`scenes.HELD_OUT`) never
# occur in training: no green star, no red triangle, and no sentence about them. A list of classes
# could not have them. A network that *composes*, that says green because it sees green and star
# because it sees a star, can say them.


# %%
class OneThing(Dataset):
    """The scenes of `ShapeScenes` with a single object: "a small red star"."""

    def __init__(self, split, length):
        self.scenes = ShapeScenes(split, length)
        groups = [scene.groups for scene in self.scenes.scenes]
        self.index = [i for i, g in enumerate(groups) if len(g) == 1 and g[0].number == 1]
        self.captions = [self.scenes.captions[i][:1] for i in self.index]

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        return self.scenes[self.index[i]][0], self.captions[i]


train_set, known, new = OneThing("train", 40_000), OneThing("val", 3000), OneThing("test", 3000)
print(len(train_set), "scenes to learn from,", len(known), "and", len(new), "to test")
vocabulary = Vocabulary.build(itertools.chain(*train_set.captions))
minidl.manual_seed(2)
scenes = Captioner(
    Encoder(convolutions((16, 32, 64, 64))),
    ShowAttend(vocabulary, 64 + 2, hidden=128, embedding=64),
)
learn(scenes, caption_loader(train_set, vocabulary, 32, shuffle=True), 6)
for name, dataset in (("known pairs", known), ("new pairs", new)):
    report = metrics.evaluate(scenes, dataset)
    print(f"{name}: {100 * report.exact:.1f} % right word for word, "
          f"{100 * report.shuffled_exact:.1f} % with permuted images")  # fmt: skip
assert report.exact > 0.85 and report.shuffled_exact < 0.1

# %%
image, captions = new[0]
((best, *others),) = scenes.hypotheses(minidl.tensor(image[None]), beam=3)
for found in (best, *others):
    print(f"{np.exp(found.log_likelihood):.3f}  {vocabulary.decode(found.tokens)}")
print("truth:", captions[0])
(maps,) = scenes.attention(minidl.tensor(image[None]), [best.tokens])
words = [vocabulary.tokens[token] for token in best.tokens]
draw_attention(image, words, maps, FIGURES / "12_composing.png")

# %% [markdown]
# ![where it looks for each word](../runs/tutorials/12_composing.png)
#
# Scenes of several things, counted and in relation ("two small red stars above a blue cross"), take
# some minutes: `minidl caption train`, then `minidl caption IMAGE --model runs/caption-scenes`.
# What it takes for photographs, and how BLEU praises a model that does not look, is measured by
# `python benchmarks/experiments/captions.py --root DIR`.
#
# ## Try this
#
# 1. Four digits instead of three: `DigitStrings(digits=4)`. What does the model of three say of
#    them, and how far does it look to the right?
# 2. Unfreeze the CNN of the strings. Do they get better? What does an epoch cost now?
# 3. `ShowAndTell` in place of `ShowAttend` sees the mean of all places, once. Which of the tasks
#    above can it still do?
# 4. Spell: `Vocabulary.build(..., kind="character")`. Can it say a number it never saw whole?
# 5. Draw words at random: `model.generate(images, temperature=1.5, seed=0)`, then with `top_p=0.9`.
#
# `minidl/captioning/model.py` holds both decoders, `minidl/captioning/decoding.py` the searches.
# Next: `13_a_network_in_eight_bits.py`.
