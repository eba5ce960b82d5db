"""A model made of rules, which writes rightly numbered outlines from few words and so repeats itself all the time."""

import random

import torch

DUE = 1e4  # logit of the token that the structure needs: whatever else is written, it is written first
WORDS = {
    "en": (" salt", " photosynthesis", " well-known", " sea", " Sea", " seashore", " 1984", " the"),
    "zh": ("盐", "𠮷", "历史", "的", "食盐", "龘"),
}


class OutlineWriter:
    """Logits after any tokens of an outline. They follow from the seed and the tokens alone, greedy or sampled.

    Where the structure needs one token (a number, a word's or character's rest) that token is certain, and wrong ones
    come next: a guard that bans the due token breaks the outline. Between words there is a choice.
    """

    def __init__(self, tokenizer, seed: int, lang: str, length: int = 6, headings: int = 12):
        self.tokenizer, self.seed, self.length, self.headings = tokenizer, seed, length, headings
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        first = {"zh": " "}.get(lang, "")
        self.words = WORDS[lang]
        self.starts = [self.encode(first + word) for word in self.words]
        self.rest = [self.encode(word) for word in self.words]
        self.newline = self.encode("\n")[0]

    def logits(self, ids: list[int], size: int) -> torch.Tensor:
        """(size,) logits of the token after `ids`."""
        rng = random.Random(f"{self.seed}/{ids}")
        logits = torch.zeros(size)
        for token in {t for word in (*self.starts, *self.rest) for t in word} | {self.newline}:
            logits[token] = rng.uniform(0, 5)
        due, choice = self._next(ids, random.Random(f"{self.seed}/{len(ids)}"))
        if due is not None:
            logits[due] = DUE
        for token in choice:
            logits[token] = rng.uniform(25, 30)
        return logits

    def _next(self, ids: list[int], rng: random.Random) -> tuple[int | None, list[int]]:
        """(the token that is due, or None; else the tokens between which the writer chooses)."""
        lines, line = [], []
        for token in ids:
            line.append(token)
            if token == self.newline:
                lines, line = [*lines, line], []
        top, sub = 0, 0
        for done in lines:
            top, sub = (top, sub + 1) if self.tokenizer.decode(done).startswith(" ") else (top + 1, 0)
        kind = random.Random(f"{self.seed}/line {len(lines)}").random()
        number = self.encode(f"   {top}.{sub + 1}" if top and kind < 0.4 else f"{top + 1}.")
        if not line and len(lines) >= self.headings:
            return self.tokenizer.eos_token_id, []
        if len(line) < len(number):
            return number[len(line)], []
        return self._word(line[len(number) :], rng)

    def _word(self, heading: list[int], rng: random.Random) -> tuple[int | None, list[int]]:
        words, place = 0, 0
        while place < len(heading):
            options = self.rest if words else self.starts
            part = heading[place:]
            if whole := [word for word in options if part[: len(word)] == word]:
                place += len(max(whole, key=len))
                words += 1
                continue
            begun = [word for word in options if word[: len(part)] == part]
            tokens = list(dict.fromkeys(word[len(part)] for word in begun))
            return (tokens[0], []) if len(tokens) == 1 else (None, tokens)
        options = self.rest if words else self.starts
        if words and rng.random() < words / self.length:
            return self.newline, []
        return None, list(dict.fromkeys(word[0] for word in options))
