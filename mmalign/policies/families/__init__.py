"""One short file per model family: which pipeline, how text conditions the network, published sampling defaults."""
