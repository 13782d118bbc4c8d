// One step of adam or adamw for all members of a chunk, in two launches. The definition is update.py, whose formulas
// these are, and whose operations on stacked tensors are some forty launches. ``real`` is float or double.

#define EVERY(i, n) \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)blockDim.x * gridDim.x)

// Writes what each member's step is made of, with the corrections of its number, and counts it; a thread a member, in
// double precision, as a rate is. What it reads has a row of all members for each of:
//   hyperparameters   learning rate, weight decay that is decoupled, weight decay that is not, beta2
//   factors           of the schedule of the rate, of that of the decay
//   active            whether a member takes a step now
//   rates             eps, decay of the weights, rate, decay in the gradient, active, beta2, 1 - beta2
extern "C" __global__ void adam_rates(
    const long long* sizes, const double* numbers, const double* hyperparameters, const double* factor,
    const double* decay_factor, const bool* active, double* done, real* rates)
{
    const long long members = sizes[0];
    EVERY(p, members) {
        const double count = done[p] + 1, beta2 = hyperparameters[3 * members + p];
        const double root = sqrt(1 - pow(beta2, count)), lr = hyperparameters[p] * factor[p];
        const double own[] = {
            numbers[1] * root,
            lr * hyperparameters[members + p] * decay_factor[p],
            lr * root / (1 - pow(numbers[0], count)),
            hyperparameters[2 * members + p] * decay_factor[p],
            active[p] ? 1.0 : 0.0,
            beta2,
            1 - beta2,
        };
        for (int row = 0; row < 7; row++) rates[row * members + p] = (real)own[row];
        done[p] += active[p];
    }
}

// Changes the parameters and the moments; a thread an entry. sizes: members, trials, entries, blocks; then of each block
// where it begins, how many entries a fold has of it, and how many neighbours belong to one trial.
extern "C" __global__ void adam_step(
    const long long* sizes, const double* numbers, const real* rates, const real* grad, real* m, real* v, real* theta)
{
    const long long members = sizes[0], trials = sizes[1], entries = sizes[2], blocks = sizes[3];
    const real share = (real)(1 - numbers[0]);
    EVERY(i, entries) {
        long long b = blocks - 1;
        while (sizes[4 + 3 * b] > i) b--;
        const long long within = i - sizes[4 + 3 * b];
        const long long fold = within / sizes[5 + 3 * b], trial = within / sizes[6 + 3 * b] % trials;
        const real* own = rates + fold * trials + trial;
        if (own[4 * members] == 0) continue;  // no step: nothing of it changes
        const real w = theta[i], g = grad[i] + own[3 * members] * w;
        m[i] += share * (g - m[i]);
        v[i] = own[5 * members] * v[i] + own[6 * members] * g * g;
        theta[i] = w - own[members] * w - own[2 * members] * (m[i] / (sqrt(v[i]) + own[0]));
    }
}
