"""Makes the training text and the tokenizer of the default model.

    select     folder of `prompt<start>answer<end>` documents  ->  pairs.jsonl.xz
    tokenizer  pairs files                                     ->  tokenizer.json (byte-level BPE)
    pack       pairs files + tokenizer.json                    ->  <out>/{train,val}.npz

The documents are the folder `training_data` of the public repository erikhyrkas/snakes (MIT).

A pair is {"prompt", "answer", "kind", "tier"}; tier "core" is the style wanted in the end,
"extra" is read mostly earlier in training. `pack` writes token ids (uint16), document sizes
and a tier flag per document, so that train.py can lay documents out anew in every epoch.

Needs Python 3.10 or newer, and numpy and tokenizers for all but `select`.
"""
import argparse
import hashlib
import json
import lzma
import pathlib
import random
import re

SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
           "<|start|>", "<|end|>", "<|message|>", "<|call|>"]
# The published split rule of the o200k family, so that one tokenizer path serves both models.
SPLIT = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])

CORE = {"generated-child", "generated-bedtime", "generated-campfire", "generated-food-stories",
        "generated-jokes", "generated-trivia", "llama-stories", "llama-slice-of-life",
        "llama-eli5", "llama-explanations", "llama-howto", "llama-song-poems"}
EXTRA = {"generated-scenes", "generated-common-sense", "llama-summaries", "llama-paraphrase",
         "llama-debates", "llama-textbook", "llama-sentences", "llama-blog", "llama-wiki",
         "generated-podcast", "generated-book-facts", "generated-movie-facts"}

# Typographic marks that a small vocabulary should not have to learn twice.
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-",
                       "\u2026": "...", "\u00a0": " ", "\t": " ", "\u2011": "-", "\u2022": "*"})
# Refusals, placeholders, links and subjects that make a pair unfit.
BAD = re.compile(r"\b(I can(?:'t|not) (?:create|write|provide|generate|fulfill|help|engage)|as an AI"
                 r"|language model|I'm sorry, but|suicid|sexual|porn|rape|nude|\[Name\]|\[Your"
                 r"|\[Host|[Nn]ote:|[Ww]ord count|copyright|https?:|www\.)")
# Opening lines such as "Here is the story:".
LEAD = re.compile(r"^(?:Sure|Certainly|Of course|Here(?:'s| is| are)|What a great|A great)[^\n]{0,160}[:!]\n+")


def clean(text):
    """Plain quotes and dashes, no markdown, no stage directions, no runs of blank lines."""
    text = text.translate(PLAIN).replace(" \u2014 ", " - ").replace("\u2014", " - ")
    text = re.sub(r"\*\*([^*\n]{1,120})\*\*", r"\1", text)           # bold off
    text = re.sub(r"(?m)^#{1,6} +", "", text)                        # headings to plain lines
    text = re.sub(r"(?m)^\[[^\]\n]*\]\s*$|^\([^)\n]*(?:[Mm]usic|[Ss]ound)[^)\n]*\)\s*$", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r" {2,}", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def readable(text):
    """At most one character in a hundred outside ASCII, and nothing of BAD."""
    odd = sum(ord(c) > 126 for c in text)
    return odd <= len(text) // 100 and not BAD.search(text)


def select(a):
    """Reads the documents, drops what is unfit or seen before, writes shuffled pairs."""
    rng = random.Random(7)
    seen, rows, told = set(), [], {}
    for path in sorted(pathlib.Path(a.source).glob("*.md")):
        kind = re.sub(r"(\.md)+$", "", path.name)
        kind = re.sub(r"[-_]?\d+(\.md)?$", "", kind).removesuffix(".md")
        if kind not in CORE and kind not in EXTRA:
            continue
        for item in path.read_text("utf-8", "replace").split("<end>"):
            prompt, start, answer = item.partition("<start>")
            if not start:
                continue
            if kind == "llama-textbook":                # whole books: by section, without a prompt
                more = [clean(x) for x in re.split(r"\n(?=#{1,3} |\*\*)", answer) if "```" not in x]
                rows += [{"prompt": "", "answer": x, "kind": kind, "tier": "extra"}
                         for x in more if len(x) > 400 and readable(x)]
                continue
            prompt, answer = clean(prompt).replace("`", '"'), clean(answer)
            answer = LEAD.sub("", answer).strip()
            prompt = re.sub(r"^Question: ", "", prompt)
            answer = re.sub(r"^Answer: ", "", answer)
            if len(answer) < 40 or len(prompt) < 8 or not readable(answer) or not readable(prompt):
                continue
            mark = hashlib.sha1(re.sub(r"\W+", "", answer[:400].lower()).encode()).digest()
            if mark in seen:
                continue
            seen.add(mark)
            rows.append({"prompt": prompt, "answer": answer, "kind": kind,
                         "tier": "core" if kind in CORE else "extra"})
            n, c = told.get(kind, (0, 0))
            told[kind] = (n + 1, c + len(prompt) + len(answer))
    books = [r for r in rows if not r["prompt"]]
    told["llama-textbook"] = (len(books), sum(len(r["answer"]) for r in books))
    rng.shuffle(rows)
    with lzma.open(a.out, "wt", preset=5) as f:
        for r in rows:
            f.write(json.dumps(r, ensure_ascii=False) + "\n")
    for kind, (n, c) in sorted(told.items(), key=lambda x: -x[1][1]):
        print(f"{kind:28} {'core' if kind in CORE else 'extra':6} {n:6} pairs {c / 1e6:7.2f} M characters")
    print(f"{len(rows)} pairs, {sum(c for _, c in told.values()) / 1e6:.1f} M characters -> {a.out}")


def pairs(files):
    """Yields the pairs of all files in order."""
    for name in files:
        with lzma.open(name, "rt") as f:
            for line in f:
                yield json.loads(line)


SYSTEM = ["You are a friendly storyteller.", "You are a helpful assistant.", "You tell stories and explain things.",
          "Answer kindly and clearly.", "You are a kind teacher who uses simple words."]


def chat(turns, rng):
    """Renders (prompt, answer) turns as a Harmony conversation; one in five has a system message."""
    text = f"<|start|>system<|message|>{rng.choice(SYSTEM)}<|end|>" if rng.random() < 0.2 else ""
    for i, (prompt, answer) in enumerate(turns):
        stop = "<|return|>" if i == len(turns) - 1 else "<|end|>"
        text += (f"<|start|>user<|message|>{prompt}<|end|>"
                 f"<|start|>assistant<|channel|>final<|message|>{answer}{stop}")
    return text


STORIES = {"generated-child": "children's ", "generated-bedtime": "bedtime ", "generated-campfire": "campfire ",
           "llama-stories": "", "llama-slice-of-life": "", "generated-scenes": ""}
# Nouns a story is about: what follows an article or a possessive, if not one of DULL.
THINGS = re.compile(r"\b(?:an?|the|his|her) ([a-z]{3,12})\b")
DULL = set("""and but with for end way day night time world one two few rest same first last next other old new very
    best only most more least back front top side middle edge heart words word voice eyes face hand hands head sound
    feeling sense sight moment story idea thing things while room air ground distance past present future truth long
    little small big great bit lot group kind name mind life part place man woman person people right left whole own
    young once sun good wind darkness silence shadows beauty scene sky light narrator camera chapter mother
    father""".split())


def ask(r, rng):
    """Stories come with a few fixed forms of request; gives most of them one a person would type."""
    sort = STORIES.get(r["kind"])
    if sort is None or rng.random() < 0.25:
        return r["prompt"]
    counts = {}
    for word in THINGS.findall(r["answer"]):
        if word not in DULL and not word.endswith(("ed", "ing", "ly", "est", "ous")):
            counts[word] = counts.get(word, 0) + 1
    often = [w for w, n in sorted(counts.items(), key=lambda x: -x[1]) if n >= 3][:4]
    title = re.search(r'called "([^"]{3,60})"', r["prompt"])
    verb = rng.choice(["Tell me", "Write", "Tell", "Can you tell me", "Please write"])
    end = "?" if verb.startswith("Can") else "."
    what = rng.choice(["a story", "a short story", f"a {sort}story"])
    if often and rng.random() < 0.7:
        picks = rng.sample(often, min(len(often), rng.choice([1, 1, 2])))
        about = " and ".join(w if w.endswith("s") else ("an " if w[0] in "aeiou" else "a ") + w for w in picks)
        return f"{verb} {what} about {about}{end}"
    if title and rng.random() < 0.7:
        return f'{verb} {what} called "{title[1]}"{end}'
    return f"{verb} {what}{end}"


def documents(files, rng):
    """Yields (tier, key, text). Short pairs are joined to conversations of 2 to 4 turns;
    three in ten of the longer answers stand alone as bare text, so that continuation works too."""
    short = []
    for r in pairs(files):
        key = r["prompt"] + r["answer"][:80]
        r["answer"] = re.sub(r"^[(\[][^)\]\n]{0,160}[)\]]\n+", "", r["answer"])
        if r["prompt"] and len(r["prompt"]) + len(r["answer"]) < 500:
            short.append((r["prompt"], r["answer"]))
            if len(short) == 1 or rng.random() < 0.45:
                if len(short) < 4:
                    continue
            yield r["tier"], key, chat(short, rng)
            short = []
            continue
        if not r["prompt"] or (len(r["answer"]) > 500 and rng.random() < 0.3):
            yield r["tier"], key, r["answer"] + "<|endoftext|>"
        else:
            yield r["tier"], key, chat([(ask(r, rng), r["answer"])], rng)


def tokenizer(a):
    """Trains a byte-level BPE with the o200k split rule and the Harmony special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=a.vocab, min_frequency=20, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    rng = random.Random(3)
    text = (x for r in pairs(a.pairs) if r["tier"] == "core" or rng.random() < 0.35
            for x in (r["prompt"], r["answer"]))
    tok.train_from_iterator(text, trainer)
    tok.save(a.out)
    print(f"{tok.get_vocab_size()} tokens -> {a.out}")


def pack(a):
    """Renders the pairs as documents, encodes them, keeps one core document in 80 for validation."""
    import numpy as np
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(a.tokenizer)
    if tok.get_vocab_size() > 65536:
        raise SystemExit("token ids are kept in 16 bits")
    out = pathlib.Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    split = {"train": ([], [], []), "val": ([], [], [])}
    rows, chars = [], 0

    def flush():
        for enc, (tier, key, _) in zip(tok.encode_batch([r[2] for r in rows]), rows):
            h = int.from_bytes(hashlib.sha1(key.encode()).digest()[:4], "big")
            part = "val" if tier == "core" and h % 80 == 0 else "train"
            ids, sizes, tiers = split[part]
            ids.append(np.asarray(enc.ids, np.uint16))
            sizes.append(len(enc.ids))
            tiers.append(tier == "core")
        rows.clear()

    for row in documents(a.pairs, random.Random(5)):
        rows.append(row)
        chars += len(row[2])
        if len(rows) == 4096:
            flush()
    flush()
    for part, (ids, sizes, tiers) in split.items():
        np.savez(out / f"{part}.npz", ids=np.concatenate(ids), sizes=np.asarray(sizes, np.int32),
                 core=np.asarray(tiers, bool))
        core = sum(s for s, t in zip(sizes, tiers) if t)
        print(f"{part}: {len(sizes)} documents, {sum(sizes) / 1e6:.2f} M tokens ({core / 1e6:.2f} M core)")
    total = sum(sum(s) for _, s, _ in split.values())
    print(f"{chars / total:.2f} characters a token")


def main():
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sub = top.add_subparsers(required=True, metavar="COMMAND")
    p = sub.add_parser("select", help="documents -> pairs", description=select.__doc__)
    p.add_argument("source", help="folder of *.md documents")
    p.add_argument("--out", required=True, help="pairs file to write, .jsonl.xz")
    p.set_defaults(go=select)
    p = sub.add_parser("tokenizer", help="pairs -> tokenizer.json", description=tokenizer.__doc__)
    p.add_argument("pairs", nargs="+", help="pairs files")
    p.add_argument("--vocab", type=int, default=4096, help="tokens, special ones included (default %(default)s)")
    p.add_argument("--out", required=True, help="tokenizer.json to write")
    p.set_defaults(go=tokenizer)
    p = sub.add_parser("pack", help="pairs + tokenizer.json -> train.npz, val.npz", description=pack.__doc__)
    p.add_argument("pairs", nargs="+", help="pairs files")
    p.add_argument("--tokenizer", required=True, help="tokenizer.json")
    p.add_argument("--out", required=True, help="folder to write")
    p.set_defaults(go=pack)
    a = top.parse_args()
    a.go(a)


if __name__ == "__main__":
    main()
