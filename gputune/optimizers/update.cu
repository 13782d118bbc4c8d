// One step of the optimizer for all members of a chunk, in two launches, or three with clipping.
// The step is defined by optimizer.py, update.py and rules.py. Their operations on stacked tensors
// need forty launches or more.

#define EVERY(i, n) \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)blockDim.x * gridDim.x)

// Arguments from the host:
//   sizes            members, trials, entries, blocks, rule, 1 if blocks have their own rates, 1 if
//                    weights are averaged, columns of the table of factors. Then for each block: its
//                    first entry, its number of entries per fold, and the number of neighboring
//                    entries that belong to one trial.
//   numbers          beta1, eps, alpha of rmsprop, beta2 of lion, eps of a norm
//   hyperparameters  one row of all members for each hyperparameter (the enum from LR on), in double
//                    precision
enum { MEMBERS, TRIALS, ENTRIES, BLOCKS, RULE, OWN_RATES, AVERAGES, COLUMNS, LAYOUT };
enum { BETA1, EPS, RMSPROP_ALPHA, LION_BETA2, NORM_EPS };
enum { LR, DECOUPLED, L2, BETA2, MOMENTUM, CLIP_NORM, EMA };
enum { ADAM, SGD, HEAVY_BALL, NESTEROV, RMSPROP, LION };
// The numbers of a member's step; each has one row of all members.
enum { ACTIVE, SCALE, IN_GRADIENT, SHRINK, RATE, ADAM_EPS, FIRST, SECOND, SHARE, RATES };
enum { LANES = 32 };  // number of threads that sum the squares of one member

// Sums the squares of each member's gradient, in LANES parts.
extern "C" __global__ void sum_squares(const long long* sizes, const real* grad, double* sums)
{
    const long long members = sizes[MEMBERS], trials = sizes[TRIALS];
    EVERY(t, members * LANES) {
        const long long p = t / LANES, fold = p / trials, trial = p % trials;
        double sum = 0;
        for (long long b = 0; b < sizes[BLOCKS]; b++) {
            const long long* block = sizes + LAYOUT + 3 * b;
            const real* begin = grad + block[0] + fold * block[1] + trial * block[2];
            for (long long i = t % LANES; i < block[1] / trials; i += LANES) {
                const real g = begin[i / block[2] * trials * block[2] + i % block[2]];
                sum += g * g;
            }
        }
        sums[t % LANES * members + p] = sum;
    }
}

// Writes the numbers of each member's step, including the corrections that depend on its count, and
// counts the step. Each thread handles one member. The index of its step is done + shift. ``rows`` has, for each member, the rows of
// ``table`` with the factors of its rate and of its decay; -1 means that all factors are 1.
extern "C" __global__ void step_rates(
    const long long* sizes, const double* numbers, const double* hyperparameters, const long long* steps,
    const long long* rows, const double* table, const double* sums, const bool* active, const double* shift,
    double* done, real* rates)
{
    const long long members = sizes[MEMBERS], rule = sizes[RULE];
    EVERY(p, members) {
        const double* own = hyperparameters + p;
        double factors[2];
        for (int k = 0; k < 2; k++) {
            const long long row = rows[k * members + p];
            factors[k] = row < 0 ? 1 : table[row * sizes[COLUMNS] + (long long)done[p] % steps[p]];
        }
        double norm = 0;
        for (int lane = 0; !isinf(own[CLIP_NORM * members]) && lane < LANES; lane++)
            norm += sums[lane * members + p];
        const double scale = own[CLIP_NORM * members] / (sqrt(norm) + numbers[NORM_EPS]);
        const double count = done[p] + shift[p], beta2 = own[BETA2 * members], lr = own[LR * members] * factors[0];
        const double root = rule == ADAM ? sqrt(1 - pow(beta2, count)) : 1;
        double of[RATES];
        of[ACTIVE] = active[p];
        of[SCALE] = scale > 1 ? 1 : scale;
        of[IN_GRADIENT] = own[L2 * members] * factors[1];
        of[SHRINK] = lr * own[DECOUPLED * members] * factors[1];
        of[RATE] = rule == ADAM ? lr * root / (1 - pow(numbers[BETA1], count)) : lr;
        of[ADAM_EPS] = numbers[EPS] * root;
        of[FIRST] = rule == ADAM ? beta2 : own[MOMENTUM * members];
        of[SECOND] = 1 - beta2;
        of[SHARE] = count == 1 ? 1 : 1 - own[EMA * members];
        for (int row = 0; row < RATES; row++) rates[row * members + p] = (real)of[row];
        done[p] += active[p];
    }
}

// Changes the parameters, the moments and the average. Each thread handles one entry. ``factors``
// are the factors of each block and member on the rate and on the decay; they are read only if
// blocks have their own rates.
extern "C" __global__ void take_step(
    const long long* sizes, const double* numbers, const real* rates, const real* factors, const real* grad, real* m,
    real* v, real* theta, real* average)
{
    const long long members = sizes[MEMBERS], trials = sizes[TRIALS], rule = sizes[RULE];
    const real beta1 = (real)numbers[BETA1], alpha = (real)numbers[RMSPROP_ALPHA], beta2 = (real)numbers[LION_BETA2];
    const real share = (real)(1 - numbers[BETA1]), rest = (real)(1 - numbers[RMSPROP_ALPHA]);
    EVERY(i, sizes[ENTRIES]) {
        long long b = sizes[BLOCKS] - 1;
        while (sizes[LAYOUT + 3 * b] > i) b--;
        const long long* block = sizes + LAYOUT + 3 * b;
        const long long within = i - block[0], p = within / block[1] * trials + within / block[2] % trials;
        const real* own = rates + p;
        if (own[ACTIVE * members] == 0) continue;  // a member without a step does not change
        const real lr = sizes[OWN_RATES] ? factors[b * members + p] : 1;
        const real decay = sizes[OWN_RATES] ? factors[(sizes[BLOCKS] + b) * members + p] : 1;
        const real w = theta[i], g = own[SCALE * members] * grad[i] + decay * own[IN_GRADIENT * members] * w;
        const real first = own[FIRST * members];
        real step = g;
        if (rule == ADAM) {
            m[i] += share * (g - m[i]);
            v[i] = first * v[i] + own[SECOND * members] * g * g;
            step = m[i] / (sqrt(v[i]) + own[ADAM_EPS * members]);
        } else if (rule == RMSPROP) {
            m[i] = alpha * m[i] + rest * g * g;
            v[i] = first * v[i] + g / (sqrt(m[i]) + own[ADAM_EPS * members]);
            step = v[i];
        } else if (rule == LION) {
            const real direction = beta1 * m[i] + share * g;
            step = (real)((direction > 0) - (direction < 0));
            m[i] = beta2 * m[i] + (1 - beta2) * g;
        } else if (rule != SGD) {
            m[i] = first * m[i] + g;
            step = rule == NESTEROV ? g + first * m[i] : m[i];
        }
        theta[i] = w - lr * decay * own[SHRINK * members] * w - lr * own[RATE * members] * step;
        if (sizes[AVERAGES]) average[i] += own[SHARE * members] * (theta[i] - average[i]);
    }
}
