"""What stages are made of, and none is itself: networks at work, their features and scores kept.

networks     a trained network over images, by shards; its outputs on a set are kept
clips        CLIP over prompts and images; its embeddings are kept
memo         rows that are computed once, by shards, and kept
restorers    a trained restorer over those features; its restorations are kept
classifiers  the training of a classifier, for detectors and judges
scan         the three trainings of SCAN
texts        the text-to-image generator that a config names, or that the run has trained
scorers      scores fitted on a network's outputs, their settings chosen, their results kept
"""
