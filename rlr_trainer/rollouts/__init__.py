"""From prompts to scored samples: prompts, sampling, scoring, and the batches that an update takes."""
