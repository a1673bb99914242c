"""What jaxseq costs beside its peers, measured side by side in one run."""
