"""Train a timm network on patches: python examples/train_patches.py SHARDS NETWORK EPOCHS."""

import sys

import timm
import torch
from torch.utils.data import DataLoader

from anchorpatch import BagDataset, PatchDataset, collate_bags

shards, name, epochs = sys.argv[1:]
train, val = PatchDataset(f"{shards}/train"), BagDataset(f"{shards}/val")
net = timm.create_model(name, num_classes=len(train.classes))
config = timm.data.resolve_data_config({"input_size": (3, 96, 96), "crop_pct": 1.0}, model=net)
train.transform = timm.data.create_transform(**config, is_training=True)
val.transform = timm.data.create_transform(**config)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for epoch in range(int(epochs)):
    for patches, labels in DataLoader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net.train()(patches), labels).backward()
        optimizer.step()
    right = 0
    for bags in DataLoader(val, batch_size=16, collate_fn=collate_bags):
        [(patches, image)] = bags.groups  # one group, as all patches have the same size
        scores = net.eval()(patches).softmax(1).detach()
        sums = torch.zeros(len(bags.labels), len(train.classes)).index_add_(0, image, scores)
        right += int((sums.argmax(1) == bags.labels).sum())
    print(f"epoch {epoch + 1}: {right / len(val):.1%} of {len(val)} images right")
