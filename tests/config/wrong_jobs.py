"""A small job that runs, and what each way to get it wrong must be answered with.

A case is its name, the words on the command line, and what the message must contain; SETS stands for the folder of
`tests.config.sets`.
"""

JOB = """\
model: {name: digits_cnn}
data:
  source: digits
  train_split: train[:100]
  eval_split: test[:50]
  mean: [0.3]
  std: [0.4]
phases:
  dense: {steps: 4}
  prune: {steps: 4}
  finetune: {steps: 2}
prune: {sparsity: 0.5, every: 2}
distill: {teacher: dense}
train: {batch_size: 50}
run: {dir: run}
tracking: {wandb: {mode: disabled}}
"""

GREY = ("data.source=parquet", "data.path=SETS/grey", "data.train_split=train", "data.eval_split=test")
COLOUR = (
    *GREY,
    "data.source=folder",
    "data.path=SETS/colour",
    "data.mean=[0.5, 0.5, 0.5]",
    "data.std=[0.2, 0.2, 0.2]",
    "model.name=nets_of_a_user:colour",
)

KEYS = [
    ("unknown section", ["modle={name: x}"], ["modle: unknown key", "did you mean 'model'?"]),
    ("unknown key", ["prune.sparcity=0.5"], ["prune.sparcity: unknown key", "did you mean 'sparsity'?"]),
    ("unknown key of a phase", ["phases.dense.epoch=3"], ["phases.dense.epoch: unknown", "did you mean 'epochs'?"]),
    ("unknown key two below", ["tracking.wandb.proyect=x"], ["tracking.wandb.proyect", "did you mean 'project'?"]),
    ("no steps between histograms", ["tracking.histograms.every=0"], ["histograms.every", "or equal to 1"]),
    ("number for histograms", ["tracking.histograms=5"], ["tracking.histograms", "got 5"]),
    ("word for artifacts", ["tracking.wandb.artifacts=best"], ["tracking.wandb.artifacts", "boolean", "'best'"]),
    ("collapse of no points", ["tracking.wandb.collapse=0"], ["tracking.wandb.collapse", "greater than 0"]),
    ("collapse of more than all", ["tracking.wandb.collapse=101"], ["wandb.collapse", "or equal to 100"]),
    ("unknown key of a teacher", ["distill.teacher={weight: x}"], ["distill.teacher.weight:", "'weights'"]),
    ("text for a number", ["train.batch_size=many"], ["train.batch_size", "integer", "'many'"]),
    ("fraction for a count", ["train.batch_size=12.5"], ["train.batch_size", "integer", "12.5"]),
    ("number in quotes", ["train.batch_size='50'"], ["train.batch_size", "integer", "'50'"]),
    ("number for yes or no", ["run.compile=1"], ["run.compile", "boolean", "got 1"]),
    ("number for a list", ["data.mean=0.3"], ["data.mean", "list", "0.3"]),
    ("text in a list of numbers", ["data.mean=[a]"], ["data.mean.0", "number", "'a'"]),
    ("number for a section", ["phases.dense=5"], ["phases.dense", "got 5"]),
    ("list for a mapping", ["model.args=[1]"], ["model.args", "dictionary", "[1]"]),
    ("sparsity of 1", ["prune.sparsity=1.0"], ["prune.sparsity", "less than 1"]),
    ("sparsity in percent", ["prune.sparsity=90"], ["prune.sparsity", "less than 1", "90"]),
    ("negative seed", ["run.seed=-1"], ["run.seed", "greater than or equal to 0"]),
    ("seed too large", ["run.seed=36893488147419103232"], ["run.seed"]),
    ("no steps between updates", ["prune.every=0"], ["prune.every", "greater than or equal to 1"]),
    ("learning rate of 0", ["phases.dense.lr=0"], ["phases.dense.lr", "greater than 0"]),
    ("infinite learning rate", ["phases.dense.lr=.inf"], ["phases.dense.lr", "finite"]),
    ("infinite length", ["phases.dense={epochs: .inf}"], ["phases.dense.epochs", "finite"]),
    ("mean that is no number", ["data.mean=[.nan]"], ["data.mean", "finite"]),
    ("deviation of 0", ["data.std=[0]"], ["data.std", "greater than 0"]),
    ("unknown precision", ["run.precision=fp8"], ["run.precision", "'fp32', 'bf16' or 'fp16'", "'fp8'"]),
    ("unknown schedule", ["phases.dense.schedule=linear"], ["phases.dense.schedule", "'cosine'", "'linear'"]),
    ("unknown source", ["data.source=imagenet"], ["data.source", "'digits', 'parquet'", "'imagenet'"]),
    ("unknown phase", ["distill.phases=[prine]"], ["distill.phases", "'prune'", "'prine'"]),
    ("unknown word for the teacher", ["distill.teacher=densee"], ["distill.teacher", "'dense'", "'densee'"]),
    ("teacher without weights", ["distill.teacher={name: resnet20}"], ["distill.teacher.weights", "missing"]),
    ("no teacher in a list", ["distill.teacher=[]"], ["distill.teacher", "at least 1"]),
    ("unknown word in a list", ["distill.teacher=[dense, densee]"], ["distill.teacher.1", "'dense'", "'densee'"]),
    ("unknown key in a list", ["distill.teacher=[{weight: x}]"], ["distill.teacher.0.weight:", "'weights'"]),
    ("weight of the teacher above 1", ["distill.alpha=1.5"], ["distill.alpha", "less than or equal to 1", "1.5"]),
    ("weight that ends below 0", ["distill.alpha={begin: 1, end: -1}"], ["distill.alpha.end", "or equal to 0", "-1"]),
    ("weight without an end", ["distill.alpha={begin: 0.9}"], ["distill.alpha.end", "missing"]),
    ("unknown shape", ["distill.alpha={begin: 1, end: 0, shape: cos}"], ["distill.alpha.shape", "'cosine'", "'cos'"]),
    ("temperature of 0", ["distill.temperature=0"], ["distill.temperature", "greater than 0"]),
    ("temperature that ends at 0", ["distill.temperature={begin: 4, end: 0}"], ["distill.temperature.end", "than 0"]),
    (
        "unknown feature loss",
        ["distill.features=[{student: '2', teacher: '2', loss: l1}]"],
        ["0.loss", "'mse'", "'l1'"],
    ),
    ("feature without a teacher", ["distill.features=[{student: '2'}]"], ["distill.features.0.teacher", "missing"]),
    ("feature without weight", ["distill.features=[{student: '2', teacher: '2', weight: 0}]"], ["0.weight", "than 0"]),
    ("nothing for a required key", ["model.name=null"], ["model.name", "string"]),
    ("unknown optimizer", ["optimizer={name: adam}"], ["optimizer", "'adam'", "'sgd', 'adamw'"]),
    ("key of another optimizer", ["optimizer={name: adamw, momentum: 0.9}"], ["optimizer.momentum", "betas"]),
    ("momentum of 1", ["optimizer={name: sgd, momentum: 1}"], ["optimizer.momentum", "less than 1"]),
    ("one beta", ["optimizer={name: adamw, betas: [0.9]}"], ["optimizer.betas", "2 items"]),
    (
        "milestone behind the end",
        ["phases.dense={steps: 4, schedule: step, milestones: [2]}"],
        ["milestones", "than 1"],
    ),
    ("several faults", ["modle=1", "run.seed=x", "train.accumulate=99"], ["3 faults", "modle", "seed", "accumulate"]),
]

COMBINATIONS = [
    ("steps and epochs", ["phases.dense={steps: 4, epochs: 3}"], ["phases.dense", "both steps and epochs"]),
    ("steps and epochs of the schedule", ["prune.length={steps: 3, epochs: 3}"], ["prune.length", "both"]),
    ("milestones without steps", ["phases.dense.milestones=[0.5]"], ["phases.dense.milestones", "schedule: step"]),
    ("steps without milestones", ["phases.dense.schedule=step"], ["phases.dense.milestones", "at least one"]),
    ("warm-up as long as its phase", ["phases.prune.warmup_steps=4"], ["phases.prune.warmup_steps", "4 steps"]),
    (
        "warm-up longer than its epochs",
        ["phases.prune={epochs: 2, warmup_steps: 5}"],
        ["phases.prune.warmup_steps", "the phase's 4 steps"],
    ),
    ("cosine that rises", ["phases.dense={steps: 4, lr: 0.1, min_lr: 0.2}"], ["phases.dense.min_lr", "above lr"]),
    ("no phase has a length", ["phases={}"], ["phases: all are of length 0"]),
    (
        "phases shorter than a step",
        ["phases={dense: {epochs: 0.1}, prune: {epochs: 0.1}}"],
        ["phases", "one optimizer step"],
    ),
    (
        "sparsity without a prune phase",
        ["phases.prune.steps=0"],
        ["phases.prune", "never reached", "prune.sparsity to 0"],
    ),
    ("untrained teacher", ["phases.dense.steps=0"], ["distill.teacher", "untrained", "model.weights"]),
    ("teacher of its own phase", ["distill.phases=[dense, prune]"], ["distill.phases", "leave dense out"]),
    ("teacher who never teaches", ["distill.phases=[]"], ["distill.phases", "never teaches"]),
    ("dense teacher twice", ["distill.teacher=[dense, dense]"], ["distill.teacher", "twice"]),
    (
        "untrained teacher among others",
        ["distill.teacher=[{weights: x}, dense]", "phases.dense.steps=0"],
        ["distill.teacher.1", "untrained"],
    ),
    (
        "feature of a teacher that is not there",
        ["distill.features=[{student: '2', teacher: '2', of: 1}]"],
        ["distill.features.0.of: 1", "0 to 0"],
    ),
    ("sparsity that falls", ["prune.initial=0.6"], ["prune.initial", "above prune.sparsity 0.5"]),
    ("schedule longer than the run", ["prune.length={steps: 7}"], ["prune.length", "7 steps", "only 6"]),
    ("nesterov alone", ["optimizer={name: sgd, nesterov: true, momentum: 0.0}"], ["optimizer.nesterov", "momentum"]),
    ("half precision on a CPU", ["run.precision=fp16", "run.device=cpu"], ["run.precision", "GPU", "bf16"]),
    ("path of the digits", ["data.path=somewhere"], ["data.path", "leave it out"]),
    ("parquet without a path", ["data.source=parquet"], ["data.path", "needs one"]),
    ("two channels", ["data.mean=[0.3, 0.3]", "data.std=[0.4, 0.4]"], ["data.mean", "grey", "RGB"]),
    ("more means than deviations", ["data.mean=[0.3, 0.3, 0.3]"], ["data.mean: 3 values, but data.std has 1"]),
    ("more micro-batches than samples", ["train.accumulate=51"], ["train.accumulate", "51", "batch_size 50"]),
    ("batch larger than the data", ["train.batch_size=101"], ["train.batch_size", "101", "100 samples"]),
]

MODELS = [
    ("unknown model", ["model.name=resnet-20"], ["model.name", "'resnet-20'", "did you mean 'resnet20'?"]),
    ("unknown torchvision model", ["model.name=torchvision:resnt50"], ["model.name", "did you mean 'resnet50'?"]),
    ("module that is not there", ["model.name=no_such_package.nets:net"], ["model.name", "cannot import"]),
    ("function that is not there", ["model.name=nets_of_a_user:color"], ["model.name", "did you mean 'colour'?"]),
    ("function of no module", ["model.name=':colour'"], ["model.name"]),
    ("function that makes no model", ["model.name=nets_of_a_user:no_module"], ["model.name", "list"]),
    ("unknown argument", ["model.args={wdith: 8}"], ["model.args", "digits_cnn", "'wdith'"]),
    ("value that an argument cannot have", ["model.args={width: -1}"], ["model.args", "digits_cnn", "-1"]),
    (
        "value that an argument asserts not to have",
        ["model.name=nets_of_a_user:Asserting", "model.args={side: 33}"],
        ["model.args", "Asserting", "multiple of 16"],
    ),
    ("images that do not fit", ["model.name=lenet300"], ["model", "(1, 8, 8)"]),
    (
        "images that a model asserts not to get",
        ["model.name=nets_of_a_user:Asserting"],
        ["model: Asserting", "(1, 8, 8)", "wrong image width"],
    ),
    ("grey images for colours", ["model.name=resnet20"], ["model: CifarResNet", "(1, 8, 8)", "3 channels"]),
    ("colours for grey images", [*COLOUR, "model.name=digits_cnn"], ["model: Sequential", "(3, 8, 8)", "1 channels"]),
    ("fewer outputs than classes", ["model.args={num_classes: 3}"], ["3 outputs", "10 classes", "num_classes=10"]),
    ("no logits in training", ["model.name=nets_of_a_user:TwoOutputsInTraining"], ["model", "logits"]),
    ("weights that are not there", ["model.weights=none.pt"], ["model.weights", "none.pt", "no such file"]),
    ("weights of another model", ["model.weights=SETS/lenet.pt"], ["model.weights", "missing", "not in the model"]),
    ("weights of other shapes", ["model.weights=SETS/narrow.safetensors"], ["model.weights", "shapes", "(8, 1, 3, 3)"]),
    ("weights that are a text", ["model.weights=SETS/text.pt"], ["model.weights", "cannot read", "text.pt"]),
    ("teacher that is not there", ["distill.teacher={weights: none.pt}"], ["distill.teacher.weights", "no such file"]),
    (
        "weights of another teacher",
        ["distill.teacher={weights: SETS/lenet.pt}"],
        ["distill.teacher.weights", "missing"],
    ),
    (
        "teacher of other images",
        ["distill.teacher={name: lenet300, weights: SETS/lenet.pt}"],
        ["distill.teacher", "(1, 8, 8)"],
    ),
    (
        "teacher of other classes",
        ["distill.teacher={name: digits_cnn, args: {num_classes: 4}, weights: SETS/four.pt}"],
        ["distill.teacher", "4", "10"],
    ),
]

FEATURES = [
    (
        "unknown module of the student",
        ["distill.features=[{student: '1.2', teacher: '2'}]"],
        ["distill.features.0.student: Sequential has no module '1.2'", "did you mean '2'?"],
    ),
    (
        "unknown module of the dense teacher",
        ["distill.features=[{student: '2', teacher: layer3}]"],
        ["distill.features.0.teacher: Sequential has no module 'layer3'", "it has 0, 1, 2"],
    ),
    (
        "unknown module of a teacher from a file",
        [
            "distill.teacher=[dense, {args: {width: 8}, weights: SETS/narrow.safetensors}]",
            "distill.features=[{student: '2', teacher: '22', of: 1}]",
        ],
        ["distill.features.0.teacher: Sequential has no module '22'", "did you mean '2'?"],
    ),
    (
        "module that is not called",
        ["model.name=nets_of_a_user:Aside", "distill.features=[{student: aside, teacher: linear}]"],
        ["distill.features.0.student: 'aside' is not called"],
    ),
    (
        "module that returns no tensor",
        ["model.name=nets_of_a_user:Aside", "distill.features=[{student: linear, teacher: words}]"],
        ["distill.features.0.teacher: 'words'", "returned a str"],
    ),
    (
        "module that returns no feature",
        ["model.name=nets_of_a_user:Aside", "distill.features=[{student: first, teacher: linear}]"],
        ["distill.features.0.student: 'first' returns shape (64,) for 2 images", "(batch, channels)"],
    ),
]

TRANSFORMS = [
    ("unknown transform", ["data.train_transforms=[RandomCorp]"], ["train_transforms.0", "did you mean 'RandomCrop'?"]),
    (
        "unknown argument of a transform",
        ["data.eval_transforms=[{Resize: {sise: 8}}]"],
        ["data.eval_transforms.0", "Resize", "'sise'"],
    ),
    (
        "value that a transform cannot have",
        ["data.train_transforms=[{RandomHorizontalFlip: {p: 3}}]"],
        ["data.train_transforms.0", "RandomHorizontalFlip", "[0.0, 1.0]"],
    ),
    (
        "two transforms in one entry",
        ["data.train_transforms=[{RandomCrop: {size: 8}, RandomHorizontalFlip: {}}]"],
        ["data.train_transforms.0", "one per list entry"],
    ),
    (
        "crop larger than the images",
        ["data.train_transforms=[{RandomCrop: {size: 20}}]"],
        ["data.train_transforms", "20"],
    ),
    ("crop larger in evaluation", ["data.eval_transforms=[{RandomCrop: {size: 20}}]"], ["data.eval_transforms", "20"]),
    ("crop of half a pixel", ["data.train_transforms=[{RandomCrop: {size: 7.5}}]"], ["data.train_transforms", "7.5"]),
    ("transform of labels", ["data.train_transforms=[{MixUp: {num_classes: 10}}]"], ["data.train_transforms", "MixUp"]),
    ("training images that do not fit", ["data.train_transforms=[{CenterCrop: {size: 4}}]"], ["(1, 4, 4)"]),
]

DATA = [
    ("unknown split", ["data.train_split=val"], ["'val'", "train and test"]),
    ("split that is no slice", ["data.eval_split='test[:'"], ["'test[:'"]),
    ("empty split", ["data.eval_split='test[50:50]'"], ["'test[50:50]'", "empty"]),
    ("unknown split of a folder", [*GREY, "data.train_split=val"], ["'val'", "train", "test"]),
    ("images that are not there", [*GREY, "data.path=SETS/gray"], ["SETS/gray", "parquet"]),
    ("folder of other files", [*GREY, "data.path=SETS/nothing"], ["SETS/nothing", "data files"]),
    ("file that is no parquet", [*GREY, "data.path=SETS/no_parquet"], ["SETS/no_parquet", "Parquet"]),
    ("unknown image column", [*GREY, "data.image_column=img"], ["data.image_column", "'img'", "image, label"]),
    ("unknown label column", [*GREY, "data.label_column=labels"], ["data.label_column=label", "'labels'"]),
    ("labels for images", [*GREY, "data.image_column=label"], ["data.image_column", "not images"]),
    ("images for labels", [*GREY, "data.label_column=image"], ["data.label_column", "not one class number"]),
    ("label below 0", [*GREY, "data.path=SETS/unlabelled"], ["data.label_column", "labels outside 0 to 1", "(-1)"]),
    ("held-out label beyond the classes", [*GREY, "data.path=SETS/beyond"], ["data", "test", "7"]),
    ("image that is none", [*GREY, "data.path=SETS/damaged"], ["data", "image 3"]),
    (
        "unequal sizes in memory",
        [*GREY, "data.path=SETS/unequal", "data.storage=memory"],
        ["data.storage", "8x9", "stream"],
    ),
    (
        "transform of single images on the device",
        ["data.storage=device", "data.train_transforms=[{RandomRotation: {degrees: 9}}]"],
        ["data.storage", "data.train_transforms has RandomRotation", "data.storage=memory"],
    ),
    (
        "transform that makes other pixels on another device",
        ["data.storage=device", "data.eval_transforms=[{Resize: {size: 8}}]"],
        ["data.storage", "data.eval_transforms has Resize", "data.storage=memory"],
    ),
    ("loaders of what lies on the device", ["data.storage=device", "data.workers=2"], ["data.workers=0"]),
    ("tensors that are streamed", [*GREY, "data.source=tensors", "data.storage=stream"], ["data.storage", "leave"]),
    ("tensors that are not there", [*GREY, "data.source=tensors"], ["train.safetensors", "no .safetensors"]),
    ("unequal sizes in a batch", [*GREY, "data.path=SETS/unequal"], ["data.", "size"]),
]

PRUNING = [
    (
        "pattern that includes nothing",
        ["prune.include=[10.wieght]"],
        ["prune", "'10.wieght'", "did you mean '10.weight'?"],
    ),
    ("pattern that excludes nothing", ["prune.exclude=['layer9.*']"], ["prune", "'layer9.*'", "no parameter"]),
    ("everything excluded", ["prune.exclude=['*']"], ["prune", "nothing to prune", "excluded"]),
]

PLACES = [
    ("run folder that is a file", ["run.dir=SETS/text.pt"], ["run.dir", "text.pt"]),
    ("run folder inside a file", ["run.dir=SETS/text.pt/run"], ["run.dir", "text.pt"]),
    ("word without a value", ["prune.sparsity"], ["'prune.sparsity'", "section.key=value"]),
    ("value that is no YAML", ["run.seed=["], ["run.seed", "'['", "not valid YAML"]),
    ("key below a value", ["model.name.first=x"], ["model.name.first", "not a section"]),
]

METHODS = [
    ("unknown schedule", ["prune.schedule=cubik"], ["prune.schedule", "did you mean 'cubic'?", "package.module:name"]),
    ("unknown score", ["prune.score=tailor"], ["prune.score", "did you mean 'taylor'?"]),
    ("lamp as a score", ["prune.score=lamp"], ["prune.score", "prune.allocation=lamp"]),
    ("unknown allocation", ["prune.allocation=erc"], ["prune.allocation", "did you mean 'erk'?", "YAML file"]),
    ("table that is not there", ["prune.allocation=none.yaml"], ["the table of prune.allocation none.yaml"]),
    (
        "sparsity of a layer in percent",
        ["prune.allocation={'*': 50}"],
        ["prune.allocation.*", "less than or equal to 1"],
    ),
    ("table of another sparsity", ["prune.allocation={'*': 0.7}"], ["0.7000 of all weights", "0.5000 is asked for"]),
    ("table without a layer", ["prune.allocation={first: 0.5}"], ["no figure for", "exclude them"]),
    ("bounds turned round", ["prune.bounds={'*': {min: 0.9, max: 0.1}}"], ["prune.bounds.*", "0.9 is above max 0.1"]),
    ("bounds that forbid the budget", ["prune.bounds={'*': {max: 0.4}}"], ["prune.bounds", "at most", "are asked for"]),
    ("bounds above the budget", ["prune.bounds={'*': {min: 0.6}}"], ["least sparsities", "but only"]),
    ("bounds of nothing", ["prune.bounds={nothing: {max: 0.4}}"], ["'nothing' matches no parameter"]),
    ("power of a cubic", ["prune.power=2.0"], ["prune.power", "prune.schedule=polynomial"]),
    (
        "length of one shot",
        ["prune.schedule=oneshot", "prune.length={steps: 2}"],
        ["prune.length", "oneshot prunes once"],
    ),
    ("lamp of other scores", ["prune.allocation=lamp", "prune.score=random"], ["prune.allocation", "lamp scales"]),
    (
        "score before the first gradient",
        ["phases.dense.steps=0", "distill=null", "prune.score=taylor", "prune.schedule=oneshot"],
        ["prune.score", "no gradient when pruning begins", "phases.dense"],
    ),
    ("score that is not there", ["prune.score=math:cube"], ["prune.score: math has no function 'cube'"]),
    ("schedule of no module", ["prune.schedule=nowhere:Schedule"], ["prune.schedule: cannot import 'nowhere'"]),
    ("schedule that is none", ["prune.schedule=builtins:dict"], ["prune.schedule: builtins:dict is no schedule"]),
    (
        "schedule that ends too low",
        ["prune.schedule=nets_of_a_user:TooLow"],
        ["prune.schedule: nets_of_a_user:TooLow has 0.25 at its last update", "prune.sparsity 0.5"],
    ),
]

GUARDED = ["phases.prune={}", "prune.rounds={count: 2}", "prune.guard={max_drop: 1.0}"]
REWOUND = ["phases.prune={}", "phases.finetune={}", "prune.rounds={count: 2, recovery: rewind_weights}"]
ROUNDS = [
    ("rounds without a count", ["prune.rounds={recovery: rewind_lr}"], ["prune.rounds.count", "missing"]),
    ("no rounds", ["phases.prune={}", "prune.rounds={count: 0}"], ["prune.rounds.count", "or equal to 1"]),
    ("unknown recovery", ["prune.rounds={count: 2, recovery: rewind}"], ["rounds.recovery", "'rewind_lr'", "'rewind'"]),
    ("rounds and a schedule", [*GUARDED, "prune.schedule=linear"], ["prune.schedule", "leave one out"]),
    ("rounds from a sparsity on", [*GUARDED, "prune.initial=0.2"], ["prune.initial", "leave one out"]),
    ("rounds to no sparsity", [*GUARDED, "prune.sparsity=0"], ["prune.rounds", "nothing to prune"]),
    ("rounds in the phase prune", ["prune.rounds.count=2"], ["phases.prune", "leave it out"]),
    ("rounds that train nothing", [*GUARDED, "phases.finetune={}"], ["phases.finetune", "no length", "finetune"]),
    (
        "rounds shorter than a step",
        [*GUARDED, "phases.finetune={epochs: 0.1}"],
        ["phases.finetune", "shorter than one optimizer step"],
    ),
    (
        "rewinding without a dense phase",
        [*REWOUND, "prune.rounds.rewind_to.steps=1", "phases.dense={}", "distill=null"],
        ["phases.dense", "no length", "rewind_weights"],
    ),
    (
        "rewinding and fine-tuning",
        [*REWOUND, "prune.rounds.rewind_to.steps=1", "phases.finetune.steps=2"],
        ["phases.finetune", "leave it out"],
    ),
    ("rewinding weights to nowhere", REWOUND, ["prune.rounds.rewind_to", "missing"]),
    (
        "rewinding to the end",
        [*REWOUND, "prune.rounds.rewind_to.steps=4"],
        ["prune.rounds.rewind_to: step 4", "4 steps of the dense phase"],
    ),
    (
        "rewinding to steps and epochs",
        [*REWOUND, "prune.rounds.rewind_to={steps: 1, epochs: 1}"],
        ["prune.rounds.rewind_to", "both"],
    ),
    ("rewinding to fine-tune", [*GUARDED, "prune.rounds.rewind_to.steps=1"], ["rounds.rewind_to", "leave it out"]),
    (
        "teacher who never teaches in rounds",
        [*GUARDED, "distill.phases=[prune]"],
        ["distill.phases", "count as finetune"],
    ),
    (
        "rewinding weights to a place that is not told",
        [*REWOUND, "prune.rounds.rewind_to={}"],
        ["prune.rounds.rewind_to", "missing"],
    ),
    ("guard without rounds", ["prune.guard={max_drop: 1.0}"], ["prune.guard", "prune.rounds"]),
    ("guard without a bound", [*GUARDED[:2], "prune.guard={min_step: 0.1}"], ["prune.guard.max_drop", "missing"]),
    ("guard with a negative bound", [*GUARDED, "prune.guard.max_drop=-1"], ["prune.guard.max_drop", "or equal to 0"]),
    ("guard whose steps vanish", [*GUARDED, "prune.guard.min_step=0"], ["prune.guard.min_step", "greater than 0"]),
    ("guard by a set that is not there", [*GUARDED, "prune.guard.set=held"], ["prune.guard.set", "eval.sets has none"]),
    (
        "guard by a set of another name",
        [*GUARDED, "prune.guard.set=hold", "eval.sets={held: test}"],
        ["prune.guard.set", "did you mean 'held'?"],
    ),
    ("set with the name of a figure", ["eval.sets={top1: test}"], ["eval.sets.top1", "another name"]),
    ("set with the name of the split", ["eval.sets={eval: test}"], ["eval.sets.eval", "data.eval_split"]),
    (
        "set with the name of a corruption",
        ["eval.sets={noise-1: test}", "eval.corruptions=[jpeg]"],
        ["eval.sets.noise-1", "eval.corruptions"],
    ),
    ("unknown corruption", ["eval.corruptions=[fog]"], ["eval.corruptions.0", "'noise', 'blur'", "'fog'"]),
    ("word for corruptions", ["eval.corruptions=all"], ["eval.corruptions", "boolean", "'all'"]),
    (
        "corruption of what are no pixels",
        ["eval.corruptions=true", "data.eval_transforms=[ConvertImageDtype]"],
        ["eval.corruptions", "torch.float32", "ConvertImageDtype"],
    ),
    ("set whose name is no name", ["eval.sets={a/b: test}"], ["eval.sets.a/b", "pattern"]),
    ("set that is not there", ["eval.sets={held: 'validation[:10]'}"], ["'validation"]),
    (
        "movement that is to prune before it has seen a gradient",
        [*GUARDED, "phases.dense={}", "distill=null", "prune.score=movement"],
        ["prune.score", "seen no gradient"],
    ),
]

PATTERNS = [
    ("pattern that is none", ["prune.pattern=2by4"], ["prune.pattern", "2by4"]),
    ("pattern that keeps all", ["prune.pattern='4:4'"], ["prune.pattern", "1 <= N < M"]),
    ("block of one weight", ["prune.pattern=1x1"], ["prune.pattern", "two weights or more"]),
    ("block of none", ["prune.pattern='0x4'"], ["prune.pattern", "two weights or more"]),
    ("rows and lamp", ["prune.pattern=rows", "prune.allocation=lamp"], ["prune.allocation", "take another"]),
    ("blocks that nothing fits", ["prune.pattern=126x126"], ["nothing to prune", "no multiple of 126"]),
    ("permutation for no groups", ["prune.permute=true", "prune.pattern=4x4"], ["prune.permute", "to N:M"]),
    ("permutation of nothing", ["prune.permute=true", "prune.pattern=2:4"], ["prune.permute", "model.weights"]),
    (
        "permutation and features",
        [
            "prune.permute=true",
            "distill.teacher={weights: w.pt}",
            "distill.features=[{student: '6', teacher: '6'}]",
        ],
        ["prune.permute", "distill.features"],
    ),
    ("pattern of another sparsity", ["prune.pattern='1:4'"], ["prune.sparsity", "0.5", "0.75"]),
    ("pattern and lamp", ["prune.pattern=2:4", "prune.allocation=lamp"], ["prune.allocation", "take another"]),
    ("pattern and a guard", [*GUARDED, "prune.pattern=2:4"], ["prune.guard", "prune.pattern"]),
    ("pattern that nothing fits", ["prune.pattern='63:126'"], ["nothing to prune", "no multiple of 126"]),
]

TEXTS = [
    "data={task: text_classification, source: json, path: SETS/sentences, text_column: sentence, max_length: 32}",
    "data.eval_split=validation",
    "model.name=hf:SETS/bert",
]
TOKENS = [
    "data={task: causal_lm, source: json, path: SETS/sentences, text_column: sentence, max_length: 16}",
    "data.eval_split=validation",
    "model.name=hf:SETS/llama",
]
TRANSFORMERS = [
    ("unknown task", [*TEXTS, "data.task=classify"], ["data: 'classify'", "'text_classification', 'causal_lm'"]),
    (
        "options of images for texts",
        [*TEXTS, "data.mean=[0.3]"],
        ["data.mean: unknown key; it is one of images", "text_column"],
    ),
    ("labels for next tokens", [*TOKENS, "data.label_column=label"], ["data.label_column: unknown key"]),
    (
        "texts without a path",
        ["data={task: causal_lm, source: text}", "model.name=hf:SETS/llama"],
        ["data.path", "missing"],
    ),
    ("no tokens at all", [*TEXTS, "data.max_length=0"], ["data.max_length", "greater than or equal to 1"]),
    ("blocks of one token", [*TOKENS, "data.max_length=1"], ["data.max_length", "at least"]),
    ("corruptions of texts", [*TEXTS, "eval.corruptions=true"], ["eval.corruptions", "texts"]),
    ("memory format of texts", [*TEXTS, "model.channels_last=true"], ["model.channels_last", "images"]),
    (
        "images for a model of texts",
        ["model.name=hf:SETS/bert"],
        ["model.name: hf:", "data.task", "text_classification"],
    ),
    (
        "images for a teacher of texts",
        ["distill.teacher={name: 'hf:SETS/bert'}"],
        ["distill.teacher.name", "takes texts"],
    ),
    ("texts for a model of images", [*TEXTS, "model.name=digits_cnn"], ["data.tokenizer", "none of its own"]),
    (
        "tokens for a model of images",
        [*TEXTS, "model.name=digits_cnn", "data.tokenizer=SETS/bert"],
        ["model: Sequential does not take attention_mask, input_ids", "unexpected keyword"],
    ),
    ("unknown text column", [*TEXTS, "data.text_column=sentense"], ["'sentense'", "data.text_column=sentence"]),
    ("unknown pair column", [*TEXTS, "data.pair_column=secnd"], ["'secnd'", "data.pair_column=second"]),
    ("numbers for texts", [*TEXTS, "data.text_column=label"], ["data.text_column: 'label' holds", "not texts"]),
    ("words for labels", [*TEXTS, "data.path=SETS/unknown"], ["data.label_column", "not one class number"]),
    ("texts that are not there", [*TEXTS, "data.path=SETS/none"], ["data: cannot load split 'train' of json", "none"]),
    ("folder without weights", [*TEXTS, "model.name=hf:SETS/bare"], ["model.name: cannot load", "model.safetensors"]),
    ("unknown setting of a model", [*TEXTS, "model.args={layers: 3}"], ["model.args: BertConfig has no 'layers'"]),
    ("longer than the model", [*TOKENS, "data.max_length=64", "train.batch_size=8"], ["data.max_length: is 64", "32"]),
    (
        "tokens of another vocabulary",
        [*TOKENS, "model.args={vocab_size: 10, pretrained: false}"],
        ["model: LlamaForCausalLM"],
    ),
    (
        "fewer labels than classes",
        [*TEXTS, "model.args={num_labels: 1, pretrained: false}"],
        ["1 outputs", "2 classes", "model.args.num_labels=2"],
    ),
    ("less than a block", [*TOKENS, "data.train_split='train[:1]'"], ["data.max_length", "fewer than 16 tokens"]),
    (
        "untrained teacher of transformers",
        [*TEXTS, "model.args={pretrained: false}", "phases.dense={}"],
        ["distill.teacher: dense would be an untrained model"],
    ),
    ("one column for both texts", [*TEXTS, "data.pair_column=sentence"], ["data.pair_column: is data.text_column"]),
    ("only marks", [*TEXTS, "data.max_length=2"], ["data.max_length: is 2, and 2 tokens", "raise it"]),
    (
        "pretrained of words",
        [*TEXTS, "model.args={pretrained: maybe}"],
        ["model.args.pretrained: must be true"],
    ),
    ("precision among settings", [*TEXTS, "model.args={dtype: float16}"], ["model.args: dtype", "run.precision"]),
    ("code of a model", [*TEXTS, "model.args={trust_remote_code: true}"], ["trust_remote_code", "no code is loaded"]),
    ("no such activation", [*TEXTS, "model.args={hidden_act: relux}"], ["model.name: cannot load", "no 'relux'"]),
    (
        "weights of other sizes",
        [*TEXTS, "model.args={intermediate_size: 8}"],
        ["model.name: the weights of", "is (64,), here (8,)", "pretrained: false"],
    ),
    ("weights without a layer", [*TEXTS, "model.args={num_hidden_layers: 3}"], ["bert.encoder.layer.2", "is missing"]),
    ("fewer tokens than the tokenizer", [*TEXTS, "model.args={vocab_size: 9, pretrained: false}"], ["knows 9 tokens"]),
    (
        "a model that sees what comes",
        [*TOKENS, "model.name=hf:SETS/bert"],
        ["sees the tokens that it is to foretell", "model.args.is_decoder=true"],
    ),
    ("a folder that is not there", [*TEXTS, "model.name=hf:SETS/none"], ["data.tokenizer", "none: no such folder"]),
    (
        "a teacher that is not there",
        [*TEXTS, "distill.teacher={name: 'hf:SETS/none'}"],
        ["distill.teacher.name", "none: no such folder"],
    ),
    (
        "channels of texts in another order",
        [*TEXTS, "prune.permute=true", "prune.pattern=2:4"],
        ["prune.permute", "not of texts"],
    ),
    ("set with the name of a perplexity", ["eval.sets={perplexity: test}"], ["eval.sets.perplexity", "another name"]),
]

CHANNELS = ["prune.pattern=channels", "prune.sparsity=0.5"]
CHANNEL_JOBS = [
    ("channels without the pattern", ["prune.channels.multiple=8"], ["prune.channels", "prune.pattern=channels"]),
    ("channels and erk", [*CHANNELS, "prune.allocation=erk"], ["prune.allocation", "global or uniform"]),
    ("channels and min_weights", [*CHANNELS, "prune.min_weights=3"], ["prune.min_weights", "min_width"]),
    ("channels and embeddings", [*CHANNELS, "prune.embeddings=true"], ["prune.embeddings", "leave it out"]),
    ("least sparsity of channels", [*CHANNELS, "prune.bounds={'*': {min: 0.1}}"], ["prune.bounds.*.min", "max only"]),
    ("shrink_every without live", [*CHANNELS, "prune.channels.shrink_every=2"], ["shrink_every", "shrink live"]),
    (
        "live with rounds",
        [*CHANNELS, "phases.prune={}", "prune.rounds={count: 2}", "prune.channels.shrink=live"],
        ["prune.channels.shrink", "take end"],
    ),
    (
        "a penalty without a dense phase",
        [*CHANNELS, "phases.dense={}", "distill=null", "prune.channels.penalty=0.001"],
        ["prune.channels.penalty", "phase dense"],
    ),
    (
        "features of channels that go",
        [*CHANNELS, "distill.features=[{student: '8', teacher: '8'}]"],
        ["distill.features", "take never"],
    ),
    ("more channels than can go", [*CHANNELS, "prune.sparsity=0.999"], ["at most", "macs"]),
    ("no channel that can go", [*CHANNELS, "prune.include=[last]"], ["no channel", "can be removed"]),
    ("a bound that matches nothing", [*CHANNELS, "prune.bounds={'conv9': {max: 0.5}}"], ["conv9", "matches no"]),
    (
        "a norm of other scores than magnitudes",
        [*CHANNELS, "prune.score=taylor", "prune.channels.norm=l1"],
        ["prune.channels.norm", "prune.score taylor"],
    ),
    ("an unknown budget", [*CHANNELS, "prune.channels.budget=flops"], ["prune.channels.budget", "macs"]),
]

CASES = [
    *KEYS,
    *COMBINATIONS,
    *MODELS,
    *FEATURES,
    *TRANSFORMS,
    *DATA,
    *PRUNING,
    *METHODS,
    *ROUNDS,
    *PATTERNS,
    *CHANNEL_JOBS,
    *TRANSFORMERS,
    *PLACES,
]
