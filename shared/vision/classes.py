"""Names of the classes of the catalogue's image sets, in the order of their labels. No torch here:
tables and figures import this.
"""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CLASSES = {"mnist": DIGITS, "fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10, "digits": DIGITS}
