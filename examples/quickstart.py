"""Fit a damped oscillation to noisy samples with Adam."""

import numpy as np

import fusedstep as fs

rng = np.random.default_rng(0)
t = np.linspace(0, 10, 200)
y = 2.0 * np.exp(-0.3 * t) * np.cos(1.7 * t) + 0.05 * rng.standard_normal(t.size)

theta = np.array([1.0, 0.1, 1.5])  # amplitude, damping, frequency
adam = fs.Adam(theta, lr=0.01)
for _ in range(2000):
    a, d, w = theta
    decay, wave = np.exp(-d * t), np.cos(w * t)
    residual = a * decay * wave - y
    jacobian = decay * np.stack([wave, -a * t * wave, -a * t * np.sin(w * t)])
    adam.step(2 * jacobian @ residual / t.size)
print("amplitude, damping, frequency:", theta.round(2))  # close to 2.0, 0.3, 1.7
