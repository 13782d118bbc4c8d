// One step of the optimizer for all members of a chunk, in two launches, or three with clipping. The definition is
// optimizer.py with update.py and rules.py, whose operations on stacked tensors are forty launches or more.

#define EVERY(i, n) \
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)blockDim.x * gridDim.x)

// What the host gives.
//   sizes            members, trials, entries, blocks, rule, whether blocks have rates of their own, whether weights are
//                    averaged, columns of the table of factors; then of each block where it begins, how many entries a
//                    fold has of it, and how many neighbours belong to one trial
//   numbers          beta1, eps, alpha of rmsprop, beta2 of lion, eps of a norm
//   hyperparameters  a row of all members for each of HYPERPARAMETERS, in double precision as a rate is
enum { MEMBERS, TRIALS, ENTRIES, BLOCKS, RULE, OWN_RATES, AVERAGES, COLUMNS, LAYOUT };
enum { BETA1, EPS, RMSPROP_ALPHA, LION_BETA2, NORM_EPS };
enum { LR, DECOUPLED, L2, BETA2, MOMENTUM, CLIP_NORM, EMA };
enum { ADAM, SGD, HEAVY_BALL, NESTEROV, RMSPROP, LION };
// What a member's step is made of, a row of all members for each.
enum { ACTIVE, SCALE, IN_GRADIENT, SHRINK, RATE, ADAM_EPS, FIRST, SECOND, SHARE, RATES };
enum { LANES = 32 };  // threads that sum the squares of a member

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

// Writes what each member's step is made of, with the corrections of its number, and counts it; a thread a member.
// ``rows`` says of each member in which row of the table the factors of its rate and of its decay are, -1: they are 1.
extern "C" __global__ void step_rates(
    const long long* sizes, const double* numbers, const double* hyperparameters, const long long* steps,
    const long long* rows, const double* table, const double* sums, const bool* active, double* done, real* rates)
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
        const double count = done[p] + 1, beta2 = own[BETA2 * members], lr = own[LR * members] * factors[0];
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
        of[SHARE] = done[p] == 0 ? 1 : 1 - own[EMA * members];
        for (int row = 0; row < RATES; row++) rates[row * members + p] = (real)of[row];
        done[p] += active[p];
    }
}

// Changes the parameters, the moments and the average; a thread an entry. ``factors`` are those of the rate and of the
// decay of each block and member, read where blocks have rates of their own.
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
        if (own[ACTIVE * members] == 0) continue;  // no step: nothing of it changes
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
