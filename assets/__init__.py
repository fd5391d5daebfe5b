"""Trained tiny models and prompt lists of the synthetic world, shipped as package data `mmalign.assets`.

One folder per model, in the on-disk format of its real counterpart, each with a README.md (model card) and a
card.json (the same facts for programs): sdxl-tiny, sd15-tiny, sd3-tiny, llava-tiny, clip-tiny, aesthetic-tiny.
`sdxl-pairs/` and `llava-pairs/` hold preference pairs made from sdxl-tiny's own images and llava-tiny's own answers,
`prompts/` the captions of `mmalign.synthetic.scenes`, one per line, as TIER_SPLIT.txt.

`build/` holds the scripts that made all of it; `python assets/build/all.py` makes everything again on a CPU.
To add a model: write build/NAME.py on top of build/common.py, add it to the list in build/all.py, and let it
write a card. Keep weights in fp16 and all assets together under 32 MiB. Read files with
`importlib.resources.files("mmalign.assets")`, never by a path relative to the working directory.
"""
