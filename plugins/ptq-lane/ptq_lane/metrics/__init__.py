"""How good the lanes of a detector are, by the rules of the public benchmarks."""
