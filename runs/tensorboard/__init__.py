"""TensorBoard behind our sign-in: one child process for each person who looks, with the runs that this person may see.

    page /tensorboard/ → frame /tensorboard/app/ → views.py → proxy.py → unix socket → serve.py (the child)
                                                      │
                                                 viewers.py starts and stops children; sources.py says what they show

The web process never imports TensorBoard. A child belongs to the web process that started it, and dies with it.
"""
