// One thread block trains one member, with the memory layout of block.h. The training is defined by
// members.c, and both share their formulas. Work (work.h) describes the training.

#ifndef BARRIER
#define BARRIER(name) __syncthreads()
#endif
// Names of the barriers; the number of a layer is added to the last two.
enum { QUEUE, GATHERED, SLOPED, ENDED, FORWARD = 10, BACKWARD = 20 };

ALWAYS_INLINE void gather(Shared &s, const Work &w, int64_t f, const Part &part)
{
    constexpr int IN = Layer<0>::IN, AT_ONCE = 8;  // number of loads that wait for memory at the same time
    const real *all = w.x + w.copies[f] * w.rows * INPUTS;
    const int numbers = filled(part.rows, FULL_ROWS) * IN;
    for (int first = threadIdx.x; first < numbers; first += AT_ONCE * THREADS) {
        real value[AT_ONCE];
        UNROLL for (int n = 0; n < AT_ONCE; n++) {
            const int i = first + n * THREADS, k = i % IN;
            value[n] = i / IN < part.rows && k < INPUTS ? all[part.which[i / IN] * INPUTS + k] : 0;
        }
        UNROLL for (int n = 0; n < AT_ONCE; n++) {
            const int i = first + n * THREADS, k = i % IN;
            if (i >= numbers) break;
            if (w.center && i / IN < part.rows && k < INPUTS)
                value[n] = scaled(value[n], w.center[f * INPUTS + k], w.scale[f * INPUTS + k]);
            s.x[i / IN * Layer<0>::INPUT_ROW + k] = value[n];
        }
    }
    for (int r = threadIdx.x; r < part.rows; r += THREADS) {
        const int64_t row = part.which[r];
        s.target[r] = CLASSES ? (real)((const int64_t *)w.y)[row] : ((const real *)w.y)[f * w.rows + row];
        if (w.weights) s.weight[r] = w.weights[f * w.rows + row];
    }
}

ALWAYS_INLINE double sum_of_warp(double of_lane)
{
    for (int lane = 16; lane; lane /= 2) of_lane += __shfl_xor_sync(0xffffffffu, of_lane, lane);
    return of_lane;
}

// The first warp sums the weights of a minibatch.
ALWAYS_INLINE void sum_weights(Shared &s, const Work &w, int64_t f, const int64_t *which, int count)
{
    if (threadIdx.x >= 32) return;
    double total = 0;
    for (int i = threadIdx.x; i < count; i += 32) total += w.weights[f * w.rows + which[i]];
    total = sum_of_warp(total);
    if (threadIdx.x == 0) s.total[0] = total > 2.2250738585072014e-308 ? total : 2.2250738585072014e-308;
}

// Dropout in one hidden layer. The factor of a unit is 1 / (1 - rate) if the unit stays, else 0. A
// unit stays if its draw is at least the rate.
struct Dropping {
    const float *draws; // of the layer, (rows, WIDTH); NULL: every unit stays
    int rows;
    real rate, scale;
};

ALWAYS_INLINE Dropping dropping_in(const Part &part, int layer)
{
    if (!DROPOUT || !part.draws) return {nullptr, 0, 0, 1};
    const real rate = (real)part.rates[layer];
    return {part.draws + layer * part.layer, part.rows, rate, 1 / (1 - rate)};
}

ALWAYS_INLINE real kept(const Dropping &dropping, int row, int column)
{
    if (!DROPOUT || !dropping.draws) return 1;
    return row < dropping.rows && dropping.draws[row * WIDTH + column] >= dropping.rate ? dropping.scale : 0;
}

template <int L> ALWAYS_INLINE void forward(Shared &s, const Part &part)
{
    using Z = Layer<L>;
    using Sum = Product<ROWS, Z::OUT, Factor<ALONG, Z::INPUT_ROW>, Factor<ACROSS, Z::ROW>>;
    const real *below = L ? s.h[L ? L - 1 : 0] : s.x;
    const Dropping dropping = L < DEPTH ? dropping_in(part, L) : Dropping{};
    Sum::template runs<1, 4>({below}, {s.parameters + Z::WEIGHT}, Z::IN, [&](int, int r, int column, Numbers<Sum::RUN> z) {
        UNROLL for (int j = 0; j < Sum::RUN; j++) z.at[j] += s.parameters[Z::BIAS + column + j];
        if constexpr (L == DEPTH) store(s.outputs + r * Z::ROW + column, z);
        else {
            if (ACTIVATION(L) != RELU) store(s.z[L] + r * Z::ROW + column, z);
            UNROLL for (int j = 0; j < Sum::RUN; j++) z.at[j] = activated(ACTIVATION(L), z.at[j]) * kept(dropping, r, column + j);
            store(s.h[L] + r * Z::ROW + column, z);
        }
    });
    BARRIER(FORWARD + L);
    if constexpr (L < DEPTH) forward<L + 1>(s, part);
}

// Replaces the outputs by the gradient of the loss in them. Four threads share a row.
ALWAYS_INLINE void slope_in_outputs(Shared &s, const Work &w, const Part &part)
{
    for (int i = threadIdx.x; i < ROWS * 4; i += THREADS) {
        const int r = i / 4;
        const real share = r >= part.rows ? 0 : part.share != 0 ? part.share : (real)(s.weight[r] / s.total[0]);
        real *z = s.outputs + r * LAST_ROW;
        if (!CLASSES) {
            if (i % 4 == 0) z[0] = r < part.rows ? number_slope(w.loss, (real)*w.loss_number, z[0] - s.target[r]) * share : 0;
            continue;
        }
        constexpr int MINE = Layer<DEPTH>::OUT / 4;
        real p[MINE], top = -INFINITY, sum = 0;
        UNROLL for (int n = 0; n < MINE; n++) {
            p[n] = z[4 * n + i % 4];
            if (s.present[4 * n + i % 4] != 0) top = p[n] > top ? p[n] : top;
        }
        for (int lane = 1; lane < 4; lane *= 2) {
            const real other = __shfl_xor_sync(0xffffffffu, top, lane);
            top = other > top ? other : top;
        }
        UNROLL for (int n = 0; n < MINE; n++) sum += p[n] = s.present[4 * n + i % 4] != 0 ? exponential(p[n] - top) : 0;
        for (int lane = 1; lane < 4; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        UNROLL for (int n = 0; n < MINE; n++)
            z[4 * n + i % 4] = p[n] * (share / sum) - (s.target[r] == 4 * n + i % 4 ? share : 0);
    }
    BARRIER(SLOPED);
}

// The gradient in the inputs of layer L, from the gradient in its outputs.
template <int L> ALWAYS_INLINE void slope_below(Shared &s, const Part &part, const real *above)
{
    using Z = Layer<L>;
    using Sum = Product<ROWS, Z::IN, Factor<ALONG, Z::ROW>, Factor<ALONG, Z::ROW>>;
    const Dropping dropping = dropping_in(part, L - 1);
    Sum::template runs<1, 2>({above}, {s.parameters + Z::WEIGHT}, Z::OUT, [&](int, int r, int unit, Numbers<Sum::RUN> gradient) {
        UNROLL for (int j = 0; j < Sum::RUN; j++) {
            real &z = s.z[L - 1][r * WIDE + unit + j];
            z = slope_in(ACTIVATION(L - 1), gradient.at[j] * kept(dropping, r, unit + j), z, s.h[L - 1][r * WIDE + unit + j]);
        }
    });
    BARRIER(BACKWARD + L);
}

// Adds the gradients of the earlier tiles to ``g``. Returns true if ``g`` is then the gradient of
// the whole minibatch; otherwise the sum is stored in the thread's scratch memory.
template <int N> ALWAYS_INLINE bool whole(const Part &part, int slot, Numbers<N> &g)
{
    if (part.begun)
        UNROLL for (int i = 0; i < N; i++) g.at[i] += part.scratch[(slot + i) * THREADS];
    if (!part.whole)
        UNROLL for (int i = 0; i < N; i++) part.scratch[(slot + i) * THREADS] = g.at[i];
    return part.whole;
}
ALWAYS_INLINE void take(const Rates &step_rates, real *w, real *first, real *second, real g)
{
    if (MOMENTS == 2) adam_step(step_rates, w, first, second, g);
    else if (MOMENTS == 1) momentum_step(step_rates, w, first, g);
    else plain_step(step_rates, w, g);
}

// Takes a layer's step, from the gradient in its outputs.
template <int L>
ALWAYS_INLINE void descend(Shared &s, const Work &w, Own<L> &registers, const Part &part, const Rates &step_rates, const Flat &at,
                           const real *gradient)
{
    using Z = Layer<L>;
    using Gradient = typename Z::Gradient;
    const real *below = L ? s.h[L ? L - 1 : 0] : s.x;
    const Dropping dropping = L < DEPTH ? dropping_in(part, L) : Dropping{};
    constexpr int RUN = Gradient::RUN;
    Gradient::template runs<Z::UNROLLED, 2>({below}, {gradient}, filled(part.rows, FULL_ROWS),
                                            [&](int number, int row, int column, Numbers<RUN> g) {
        if (!whole(part, Z::SLOT + number, g)) return;
        real *weights = s.parameters + Z::WEIGHT + row * Z::ROW + column;
        Numbers<RUN> parameters = load<RUN>(weights);
        UNROLL for (int j = 0; j < RUN; j++) {
            const int64_t place = at.weight + row * at.row + column + j;
            if constexpr (Z::IS_HELD)
                take(step_rates, parameters.at + j, registers.first + number + j, registers.second + number + j, g.at[j]);
            else if (row < Z::BELOW && column + j < Z::ABOVE)
                take(step_rates, parameters.at + j, w.first + place, w.second + place, g.at[j]);
        }
        store(weights, parameters);
    });
    const int j = bias<L>();
    if (j < 0) return;
    Numbers<1> g = {};
#pragma unroll 8
    for (int r = 0; r < part.rows; r++) g.at[0] += gradient[r * Z::ROW + j];
    if (whole(part, Z::SLOTS - 1, g)) take(step_rates, s.parameters + Z::BIAS + j, &registers.bias_first, &registers.bias_second, g.at[0]);
}

template <int L>
ALWAYS_INLINE void backward(Shared &s, const Work &w, int64_t f, int64_t c, Own<L> &registers, const Part &part, const Rates &step_rates)
{
    const real *gradient = L < DEPTH ? s.z[L < DEPTH ? L : 0] : s.outputs;
    if constexpr (L > 0) slope_below<L>(s, part, gradient);  // before the step, because it needs the old weights
    descend<L>(s, w, registers, part, step_rates, flat<L>(w, f, c), gradient);
    if constexpr (L > 0) backward<L - 1>(s, w, f, c, registers, part, step_rates);
}

// Sums the scores of the validation rows from ``at`` on, and writes their outputs, if Work asks for
// them.
ALWAYS_INLINE void score(Shared &s, const Work &w, int64_t f, int64_t c, const Part &part, int64_t at, int epoch)
{
    const int64_t begin = w.valid_start[f], count = w.valid_start[f + 1] - begin;
    const int64_t first = w.trials * (epoch * w.valid_start[w.folds] + begin) + c * count + at;
    if (w.scored)
        for (int i = threadIdx.x; i < part.rows * OUTPUTS; i += THREADS)
            w.scored[OUTPUTS * first + i] = s.outputs[i / OUTPUTS * LAST_ROW + i % OUTPUTS];
    const int r = threadIdx.x;
    if (!w.means || r >= 64) return;
    const double of_row = r < part.rows ? row_score(&w, CLASSES, f, s.outputs + r * LAST_ROW, part.which[r]) : 0;
    const double sum = sum_of_warp(of_row);
    if (r % 32 == 0) s.total[r / 32] = sum + (at ? s.total[r / 32] : 0);
}

// Takes the steps ``begin`` to ``end`` of one member, counted from the beginning of Work's epoch.
ALWAYS_INLINE void train(Shared &s, const Work &w, int64_t f, int64_t c, real *scratch, int begin, int end, int epochs)
{
    const int n = (int)w.lengths[f], size = w.sizes[c] < n ? (int)w.sizes[c] : n, steps = (n + size - 1) / size;
    if (begin >= epochs * steps) return;
    const int64_t valid = w.scored || w.means ? w.valid_start[f + 1] - w.valid_start[f] : 0;
    bool drops = false; // whether a hidden layer has a dropout rate above 0
    for (int layer = 0; DROPOUT && layer < DEPTH; layer++) drops |= w.dropout[c * DEPTH + layer] > 0;
    Own<DEPTH> registers;
    move<DEPTH, false>(s, w, registers, f, c);
    const int output = threadIdx.x;
    if (output < Layer<DEPTH>::OUT) s.present[output] = output < OUTPUTS ? w.present[f * OUTPUTS + output] : 0;
    for (int step = begin; step < end && step < epochs * steps; step++) {
        const int epoch = step / steps, within = step % steps, of = (step - begin) % STEPS;
        const int count = n - within * size < size ? n - within * size : size;
        const int64_t *which = w.order + (epoch * w.folds + f) * w.longest + within * size;
        const int64_t all = count + (within + 1 == steps ? valid : 0);
        if (of == 0 && threadIdx.x < STEPS)  // rates are slow in double precision, so the threads compute many at once
            s.rates[threadIdx.x] =
                rates(&w, f, c, (double)w.epoch * steps + step + threadIdx.x, (double)w.horizon * steps);
        if (w.weights) sum_weights(s, w, f, which, count);
        for (int64_t at = 0; at < all;) {  // the minibatch, and after the last one of an epoch the validation rows
            const bool training = at < count;
            const int64_t left = (training ? count : all) - at;
            Part part = {training ? which + at : w.valid + w.valid_start[f] + at - count, left < ROWS ? (int)left : ROWS};
            part.begun = at > 0;
            part.whole = left <= ROWS;
            part.rates = w.dropout + c * DEPTH;
            part.layer = DROPOUT ? w.draw_rows[within] * WIDTH : 0;
            part.scratch = scratch;
            part.share = w.weights ? 0 : 1 / (real)count;
            part.draws = drops && training ? w.draws + w.draw_start[epoch * w.longest + within] + at * WIDTH : nullptr;
            gather(s, w, f, part);
            BARRIER(GATHERED);
            forward<0>(s, part);
            if (training) {
                slope_in_outputs(s, w, part);
                const Rates step_rates = s.rates[of];
                backward<DEPTH>(s, w, f, c, registers, part, step_rates);
            } else score(s, w, f, c, part, at - count, epoch);
            at += part.rows;
            BARRIER(ENDED);
        }
        if (all > count && w.means && threadIdx.x == 0)
            w.means[(epoch * w.folds + f) * w.trials + c] = (s.total[0] + s.total[1]) / valid;
    }
    move<DEPTH, true>(s, w, registers, f, c);
}

// Each block takes members from the queue until it is empty. ``next`` is the number of members
// already taken.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
train_members(const Work *work, unsigned *next, real *scratch, int begin, int end, int epochs)
{
    extern __shared__ __align__(16) char memory[];
    Shared &s = *(Shared *)memory;
    const Work &w = *work;
    real *thread_scratch = scratch + (int64_t)blockIdx.x * Layer<DEPTH>::SLOTS * THREADS + threadIdx.x;
    for (int turn = 0;; turn ^= 1) {
        if (threadIdx.x == 0) s.place[turn] = atomicAdd(next, 1u);
        BARRIER(QUEUE);
        const int64_t place = s.place[turn];
        if (place >= w.folds * w.trials) return;
        train(s, w, w.queue[place] / w.trials, w.queue[place] % w.trials, thread_scratch, begin, end, epochs);
    }
}
