"""``python -m train.study``: what keeps a lengthened model good, on equal terms.

    settings    what a user may set
    base        the base model: where it lies, and whether it is trained enough to judge masks
    rows        the list of rows, each with the settings of its run
    runs        the tuned rows as run folders of the trainer, within a time
    truth       what of a clip has to be remembered, from the truth that comes with it
    detect      objects found in pixels: permanence and trajectories
    losses      the flow loss by length and noise level, and of what has to be remembered
    clips       clips that go on from given frames, and their measures
    frechet     Fréchet distance in the base's own features
    fits        which masks are fitted to the base, as words and as file names
    masks       the base's own attention, and the masks that are fitted to it
    parts       what one process does at a time: a row's losses, a row's clips
    gpus        processes that see one GPU each
    pool        the parts, one after the other or several at a time, over the GPUs that there are
    results     table, paired differences, conclusions
    pictures    the picture of cost against loss, the strip of clips
    page        the page
    run         the order of all this, and where it stopped

`README.md` beside this file is the manual.
"""
