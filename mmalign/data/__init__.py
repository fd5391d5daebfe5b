"""Preference rows: readers, images, texts, the feature cache and the audit.

    config.data ──load.py──▶ RowSet of Row ──cache.py──▶ encoded once, on disk ──features.py──▶ records for a batch
                   │                                                         (text_features.py for language models)
                   │                                                         audit.py: `mmalign data check`
                   ├─ a reader per format. Pairs of images: folders.py, jsonl.py, columns.py (Parquet, hub), pickapic.py
                   ├─ pairs of texts: the same jsonl.py and columns.py, preferences.py (TRL, RLHF-V, mDPO)
                   └─ synthetic.py; prompts.py (prompts alone); questions.py (to evaluate on)

* A **reader** is a function `read_x(path, *, options…)` that yields `Row`, `BadRow` (unusable: an error or, with
  `data.on_bad_row: skip`, counted and listed) and `Dropped` (left out on purpose, e.g. a tie). Its keyword-only
  parameters are its options in the config, checked strictly.
* To **add a reader**: write the function (in the package, or anywhere: `data.format: my_reader.py:read_mine`), use
  `fields.RowBuilder` (images) or `records.text_rows` (texts) for the checks that all readers share, register the name in
  `mmalign.registry.TABLES["reader"]` and, if `auto` should find it, teach `readers.detect_format`.
* **Rows hold references, never pixels.** A million rows fit in memory because an `ImageRef` into a table reads its
  cell when asked. What needs image bytes (undecodable files, identical bytes) is therefore found when the cache is
  built, by `load.verify_images`, or by `mmalign data check`, not at load.
* **What a model can use is asked of its features**: `Features.problem(row)` knows the modality and, for language models,
  the tokenizer and the length limit; `build_cache` and `load.check_rows` ask it before anything is encoded.
* **Images or texts** is told by what the first rows hold (responses.py); `data.options.responses` decides where that is
  unclear. An `<image>` mark in a prompt stands for one image; a plain prompt without marks shows its images first.
* **Row ids are identities.** Crops, flips, noise, image negatives and label noise are functions of the id; ids should not
  depend on the order of rows. A row without one gets it from its texts and image names; only where images lie in table
  cells (Parquet, hub) do file and row number enter, so give such tables an `id` column if rows may move. Two rows with
  the same explicit id are an error.

Gotchas: `crop_top_left` counts in the resized *and flipped* image, as in the published SDXL scripts. Random access into
a Parquet row group decodes the whole column chunk: keep `data.cache: true`. Records from a cache are shared: never
modify their tensors in place. An image key names content and treatment; equal token ids about other images never meet.
"""
