"""Measure when a temperature helps: one training per row, appended to benchmarks/atlas.csv, and pages made from it.

    uv run --with mlxtend --with aeon python -m benchmarks.atlas run --cifar100 ~/data/cifar100
    uv run python -m benchmarks.atlas page   # writes docs/atlas.md, the plots, and the parts of other pages

``run`` resumes: rows in the CSV are not trained again. A task whose data are not there is left out.

A setting is a task, training images (or texts), an optimiser, a length and a teacher. Within a setting every arm shares
the split, the teacher, the student's first weights and the order of the batches of a seed. The learning rate of an arm
is chosen by its mean validation score; the test part is read once, after training, and chooses nothing.
"""
