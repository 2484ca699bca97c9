"""The shapes of known models' variables, for benchmarks."""

Shapes = list[tuple[int, ...]]


def bert(width: int = 768, layers: int = 12) -> Shapes:
    """BERT base; large has width 1024 and 24 layers."""
    norm, dense = [(width,), (width,)], [(width, width), (width,)]
    layer = [*4 * dense, *norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,), *norm]
    return [(30522, width), (512, width), (2, width), *norm, *layers * layer, *dense]


def resnet50() -> Shapes:
    """torchvision's: convolutions without bias, batch norm's gamma and beta after each, a dense layer."""
    convolutions: Shapes = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in (64, 3), (128, 4), (256, 6), (512, 3):
        convolutions.append((4 * width, channels, 1, 1))  # the shortcut of a stage's first block
        for _ in range(blocks):
            convolutions += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            channels = 4 * width
    return [s for kernel in convolutions for s in (kernel, kernel[:1], kernel[:1])] + [(1000, 2048), (1000,)]


def small() -> Shapes:
    """500 variables with little in them."""
    return [(64, 64)] * 250 + [(64,)] * 250
