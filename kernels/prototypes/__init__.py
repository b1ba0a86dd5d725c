"""Cross-entropy and entropies of softmax assignments to prototypes."""
