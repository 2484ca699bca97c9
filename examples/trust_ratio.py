"""Trust ratios of every layer in TensorBoard, of LAMB and of AdamW. Run: python examples/trust_ratio.py

Two trainings of the same network on handwritten digits, from the same weights. Then:

    tensorboard --logdir trust_ratio
"""

import argparse
from pathlib import Path

import keras
from sklearn.datasets import load_digits

import tf_adam_variants as tav

OPTIMIZERS = {
    "LAMB": lambda: tav.LAMB(0.005, weight_decay=0.01, exclude_from_weight_decay=["bias"]),
    "AdamW": lambda: tav.AdamW(0.002, weight_decay=0.01, exclude_from_weight_decay=["bias"]),
}


def network() -> keras.Model:
    """A small convolutional network, from one seed."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, "relu", name="hidden"),
            keras.layers.Dense(10, name="classes"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log-dir", type=Path, default=Path("trust_ratio"))
    parser.add_argument("--quick", action="store_true", help="two epochs")
    options = parser.parse_args()
    digits = load_digits()
    x, y = digits.images[..., None] / 16, digits.target
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for name, optimizer in OPTIMIZERS.items():
        model = network()
        model.compile(optimizer(), loss)
        ratios = tav.callbacks.TrustRatioLogger(options.log_dir / name, update_freq=10, history=True)
        epochs = 2 if options.quick else 30
        history = model.fit(x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=[ratios]).history
        print(f"{name}: loss {history['loss'][-1]:.4f}. The last trust ratios:")
        for tag, values in history.items():
            if tag.startswith("trust_ratio/"):
                print(f"  {tag.removeprefix('trust_ratio/'):16}{values[-1]:8.3f}")


if __name__ == "__main__":
    main()
