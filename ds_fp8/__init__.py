"""FP8 training for DeepSpeed, by editing JSON."""
