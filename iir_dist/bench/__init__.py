"""`iir bench distractors`: what a benchmark's mAP and a search cost as distractors are added, up to millions."""
