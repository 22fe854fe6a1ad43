"""What can be wrong in a spec, one module per theme; `tuner.spec.check` asks them all."""
