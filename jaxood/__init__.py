"""Out-of-distribution detectors for images, trained on outliers that diffusion models invent.

The package from the top down; nothing imports what stands above it (tests/test_imports.py).

    main predict convert bench doctor
                              the commands; they parse before they import JAX
    deployed                  a trained detector as a function of images
    experiment                arms x seeds through the stages: plan, reuse, resume
    stages/                   pseudo_label (or train_pipeline) learn_tokens words train_diffusion
                              train_judges synthesise pretrain_detector train_detector (or
                              load_weights) train_restorer score reconstruct_pixels report: they
                              alone read the config, and leave artefacts; parts/ is what they are
                              made of (networks, restorers, generators and CLIP at work, scorers),
                              sections/ are parts of the report, one a method
    config artefacts          sections, arms, fingerprints; folders named by what made them
    synthesis/ detectors/ report/
                              strategies that invent outliers, and the leak filter; training
                              methods; tables, figures and the page
    diffusion/ models/ losses/ scores/ data/ train/
                              schedules, process, samplers; Flax networks, and the way to them from
                              public checkpoints (pretrained, layouts; components for folders of
                              diffusers and transformers: stable_diffusion/, clip/); losses; OOD
                              scores; sources, splits, batches; the one training loop
    rng parallel metrics      keys by purpose and index; devices; AUROC and its relatives
    memory                    what programs take of a device, and what would fit
    neighbours clustering frechet
                              the nearest in a bank; clusters against classes; distance of features
    hosts                     several hosts that act as one: meeting, agreeing, losing one another
    errors console machine    what the user can mend; what a run says; what it runs on

Four systems are being built on it, each as one config: metric-mixup, SD-outliers, DLSR and DOG.
Adding a score, loss, backbone, strategy, training method or data source is one function and one
line in that folder's table, a plain dict in its `__init__.py`.
"""

__version__ = '0.1.0'
