# Tiles: samples in the SIMD lanes.
#
# A tile is LANES samples that follow each other in (outer, inner) order, held in scratch as
# [class][lane]; lanes without a sample hold zeros. A unit is one tile, or, where samples lie next
# to each other in memory, several side by side, so that runs of memory are longer. Scratch: room
# for samples one after the other, as rows, then the unit's tiles, twice; transposing moves eight by
# eight, and may go seven beyond either. Then the carries, for runs of output that begin and end
# within a cache line.

cdef inline real* tile_of(const Job* job, real* scratch) noexcept nogil:
    return scratch + (job.num_classes + 1) * LANES


cdef inline real* other_tile_of(const Job* job, real* scratch) noexcept nogil:
    return tile_of(job, scratch) + (job.num_classes + 8) * job.step


cdef inline Py_ssize_t tile_numbers(const Job* job) noexcept nogil:
    return (job.num_classes + 1) * LANES + 2 * (job.num_classes + 8) * job.step


cdef inline void load_tiles(
    const Job* job, Storage storage, const char* data, Py_ssize_t unit, real* tile, real* buffer
) noexcept nogil:
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.step
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t lane = 0, width, c, o, i
    cdef const real* line
    cdef real* to
    if inner == 1:
        line = load_block(storage, data, first * C, n * C, buffer)
        if line != buffer and (first + LANES) * C + 8 > job.rows * C:
            # Transposing must not read beyond the array.
            memset(buffer, 0, LANES * C * sizeof(real))
            memcpy(buffer, line, n * C * sizeof(real))
            line = buffer
        elif n < LANES:
            memset(buffer + n * C, 0, (LANES - n) * C * sizeof(real))
        for lane in range(0, LANES, 8):
            for c in range(0, C, 8):
                transpose(line + lane * C + c, C, tile + c * step + lane, step)
        return
    if n < job.group:
        memset(tile, 0, C * step * sizeof(real))
    while lane < n:
        o, i = (first + lane) // inner, (first + lane) % inner
        width = min(n - lane, inner - i)
        for c in range(C):
            to = tile + c * step + lane
            line = load_block(storage, data, (o * C + c) * inner + i, width, to)
            if line != to:
                memcpy(to, line, width * sizeof(real))
        lane += width


cdef inline void store_tiles(
    const Job* job, Py_ssize_t unit, const real* tile, real* buffer
) noexcept nogil:
    cdef Py_ssize_t C = job.num_classes, inner = job.inner, step = job.step
    cdef Py_ssize_t first = unit * job.group, n = rows_in_unit(job, unit)
    cdef Py_ssize_t lane = 0, width, c, o, i
    if inner == 1:
        # From the last classes to the first: what goes beyond a row is written over by the next.
        for lane in range(0, LANES, 8):
            for c in range((C - 1) // 8 * 8, -1, -8):
                transpose(tile + c * step + lane, step, buffer + lane * C + c, C)
        store(job, first * C, n * C, buffer)
        return
    while lane < n:
        o, i = (first + lane) // inner, (first + lane) % inner
        width = min(n - lane, inner - i)
        for c in range(C):
            store_run(job, carry_of(job, buffer, c), (o * C + c) * inner + i, width,
                      tile + c * step + lane)
        lane += width


cdef inline void clear_dead_lanes(const Job* job, const Rows* r, real* tile) noexcept nogil:
    """Nothing of a row that counts for nothing, a NaN least of all, gets through."""
    cdef Py_ssize_t step = job.step, c, lane
    cdef int dead = 0
    for lane in range(LANES):
        dead |= r.row_weight[lane] == 0.0
    if not dead:
        return
    for lane in range(LANES):
        if r.row_weight[lane] == 0.0:
            for c in range(job.num_classes):
                tile[c * step + lane] = 0


cdef inline void largest_in_lanes(const Job* job, const real* tile, real* maximum) noexcept nogil:
    cdef real m[LANES]
    cdef Py_ssize_t step = job.step, c, j
    for j in range(LANES):
        m[j] = <real>-INFINITY
    for c in range(job.num_classes):
        for j in range(LANES):
            m[j] = tile[c * step + j] if tile[c * step + j] > m[j] else m[j]
    for j in range(LANES):
        maximum[j] = m[j]


cdef inline void find_in_lanes(
    const Job* job, const real* tile, const real* maximum, int32_t* index
) noexcept nogil:
    """The first class whose score is the maximum, or 0."""
    cdef real m[LANES]
    cdef int32_t k[LANES]
    cdef int32_t c
    cdef Py_ssize_t step = job.step, j
    for j in range(LANES):
        m[j] = maximum[j]
        k[j] = 0
    for c in range(<int32_t>job.num_classes - 1, -1, -1):
        for j in range(LANES):
            k[j] = c if tile[c * step + j] == m[j] else k[j]
    for j in range(LANES):
        index[j] = k[j]


cdef inline void take_maxima(const Job* job, const real* tile, Rows* r) noexcept nogil:
    cdef real maximum[LANES]
    cdef Py_ssize_t j
    largest_in_lanes(job, tile, maximum)
    for j in range(LANES):
        r.maximum[j] = maximum[j]


cdef inline void fold_parts(const real* parts, double* total) noexcept nogil:
    """As fold, of the parts of every lane."""
    cdef double s[8 * LANES]
    cdef Py_ssize_t i, half = 4
    for i in range(8 * LANES):
        s[i] = (<double>parts[i] + <double>parts[i + 8 * LANES]) + (
            <double>parts[i + 16 * LANES] + <double>parts[i + 24 * LANES])
    while half > 1:
        for i in range(half * LANES):
            s[i] += s[i + half * LANES]
        half //= 2
    for i in range(LANES):
        total[i] = s[i] + s[i + LANES]


cdef inline void fold_eight(real* parts, Py_ssize_t n, double* total) noexcept nogil:
    """As sum_eight, of the n parts of every lane."""
    cdef Py_ssize_t i, half = n // 2
    while half > 0:
        for i in range(half * LANES):
            parts[i] += parts[i + half * LANES]
        half //= 2
    for i in range(LANES):
        total[i] = parts[i]


cdef inline int32_t parts_of(const Job* job) noexcept nogil:
    """The partial sums of a row: no more than would not be zeros."""
    cdef int32_t parts = CHUNK if adds_as_rows(job) else EIGHT
    while parts >= 2 * job.num_classes:
        parts //= 2
    return parts


cdef inline int32_t part_of(const Job* job, int32_t c, int32_t parts) noexcept nogil:
    """The partial sum that class c goes to."""
    return (c - (0 if adds_as_rows(job) else <int32_t>job.num_classes)) & (parts - 1)


cdef inline void fold_row_parts(
    const Job* job, real* parts, int32_t n, double* total
) noexcept nogil:
    if adds_as_rows(job):
        fold_parts(parts, total)
    else:
        fold_eight(parts, n, total)


cdef inline void exp_tile(
    const Job* job, Py_ssize_t first, const real* tile, const int32_t* index, real* e,
    bint as_rows, Rows* r,
) noexcept nogil:
    """The exponentials e, in units of r.maximum or, by r.own, common ones, and their sums.

    The sums are without class index, whose exponential is apart; if as_rows, they are added up in
    the order of rows.pxi, so that bits do not depend on which axis the classes are. e may be the
    tile, or NULL.
    Meanwhile the scores of the unit after that of row `first` are fetched, so that memory is
    never idle.
    """
    cdef real pivot[LANES]
    cdef real magic[LANES]
    cdef real lowest[LANES]
    cdef real highest[LANES]
    cdef real left_out[LANES]
    cdef real own[TEMPER]
    cdef real m
    cdef real line[LANES]
    cdef real lane[LANES]
    cdef real parts[CHUNK * LANES]
    cdef double total[LANES]
    cdef int32_t hole[LANES]
    cdef Py_ssize_t size = itemsize(job.storage), step = job.step, next = first + job.group
    cdef Py_ssize_t later_step = (LANES if job.inner == 1 else job.inner) * size
    cdef const char* later = job.logits + size * (
        next // job.inner * job.num_classes * job.inner + next % job.inner)
    cdef int32_t c, part, among = parts_of(job)
    cdef Py_ssize_t j
    memcpy(own, temper_of(job, tile[0]), sizeof(own))
    for j in range(LANES):
        m = <real>r.maximum[j] if r.own[j] else <real>0.0
        units_of_row(m, r.own[j], own, &pivot[j], &magic[j], &highest[j])
        lowest[j] = lowest_of(magic[j], own)
        left_out[j] = 0
        hole[j] = index[j]
        lane[j] = 0
        total[j] = 0.0
    if as_rows:
        memset(parts, 0, among * LANES * sizeof(real))
    for c in range(<int32_t>job.num_classes):
        fetch(later + c * later_step, LANES * size)
        for j in range(LANES):
            line[j] = exponential(
                below(tile[c * step + j], highest[j]), pivot[j], magic[j], lowest[j], own)
        if as_rows:
            part = part_of(job, c, among) * LANES
            for j in range(LANES):
                parts[part + j] += <real>0 if hole[j] == c else line[j]
        else:
            for j in range(LANES):
                lane[j] += <real>0 if hole[j] == c else line[j]
        for j in range(LANES):
            left_out[j] = line[j] if hole[j] == c else left_out[j]
        if e != NULL:
            for j in range(LANES):
                e[c * step + j] = line[j]
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total[j] += lane[j]
                lane[j] = 0
    if as_rows:
        fold_row_parts(job, parts, among, total)
    for j in range(LANES):
        r.others[j] = total[j] + lane[j]
        r.target_exp[j] = left_out[j]


cdef inline void narrow_factors(const Job* job, real* tile, const Rows* r, real* f) noexcept nogil:
    """As narrow_factor, for every lane."""
    cdef real power = power_of(tile[0]), tiny = tiny_of(tile[0])
    cdef double narrow
    cdef bint small = False
    cdef Py_ssize_t j
    for j in range(LANES):
        narrow = r.factor[j] * power
        f[j] = <real>narrow
        small |= (-tiny < narrow) & (narrow < tiny) & (r.factor[j] != 0)
    for j in range(LANES if small else 0):
        f[j] = narrow_factor(tile + j, job.num_classes, job.step, r.factor[j])


cdef inline void find_hopeless(
    const Job* job, const real* tile, int32_t* own, Rows* r, const int32_t* untamed
) noexcept nogil:
    """The rows that need units of their own, by their maxima; looked for on suspicion."""
    cdef const real* temper
    cdef real hopeless
    cdef Py_ssize_t j
    for j in range(LANES):
        own[j] = 0
        r.maximum[j] = 0.0
    if untamed[0] or is_apart(job):
        temper = temper_of(job, tile[0])
        hopeless = <real>INFINITY if is_apart(job) else hopeless_of(job.num_classes, temper)
        take_maxima(job, tile, r)
        for j in range(LANES):
            own[j] = is_hopeless(<real>r.maximum[j], hopeless, temper)
    for j in range(LANES):
        r.own[j] = own[j]


cdef inline bint exp_tile_untamed(
    const Job* job, Py_ssize_t first, real* tile, const int32_t* index, double scale, real* e,
    Rows* r, int32_t* untamed,
) noexcept nogil:
    """exp_tile in common units, or, for rows that these are not for, in their own; whether there
    are such rows. If the last unit had some, these are looked for beforehand, by their maxima."""
    cdef int32_t left = 0, found = 0
    cdef int32_t own[LANES]
    cdef Py_ssize_t j
    find_hopeless(job, tile, own, r, untamed)
    exp_tile(job, first, tile, index, e, True, r)
    for j in range(LANES):  # nothing left out
        r.target_exp[j] = r.others[j] if index[j] < 0 else r.target_exp[j]
    find_untamed(job, r, LANES, scale, tile[0])
    for j in range(LANES):
        left |= r.own[j] & (own[j] ^ 1)
        r.own[j] |= own[j]
        found |= r.own[j]
    if left:
        take_maxima(job, tile, r)
        exp_tile(job, first, tile, index, e, True, r)
    untamed[0] = found
    return found


cdef void softmax_tile(
    const Job* job, Py_ssize_t first, real* tile, real* e, int32_t* untamed
) noexcept nogil:
    cdef Rows r
    cdef real inverse[LANES]
    cdef int32_t index[LANES]
    cdef Py_ssize_t c, j, step = job.step
    for j in range(LANES):
        index[j] = -1
        r.row_weight[j] = r.target_weight[j] = 1.0
    exp_tile_untamed(job, first, tile, index, 1.0, e, &r, untamed)
    for j in range(LANES):
        inverse[j] = <real>(1.0 / r.others[j])
    for c in range(job.num_classes):
        for j in range(LANES):
            tile[c * step + j] = e[c * step + j] * inverse[j]


cdef inline void top_of_tile(
    const Job* job, Py_ssize_t first, const real* tile, Rows* r
) noexcept nogil:
    """As top_of_row, of lanes, each by r.own in its own units, and in the order of rows.

    Meanwhile memory is fetched, as in exp_tile.
    """
    cdef real pivot[LANES]
    cdef real magic[LANES]
    cdef real lowest[LANES]
    cdef real highest[LANES]
    cdef real m[LANES]
    cdef real line[LANES]
    cdef real others[CHUNK * LANES]
    cdef real top[CHUNK * LANES]
    cdef real own[TEMPER]
    cdef real t
    cdef Py_ssize_t size = itemsize(job.storage), step = job.step, next = first + job.group
    cdef Py_ssize_t later_step = (LANES if job.inner == 1 else job.inner) * size
    cdef const char* later = job.logits + size * (
        next // job.inner * job.num_classes * job.inner + next % job.inner)
    cdef int32_t c, part, half = parts_of(job)
    cdef Py_ssize_t j
    memcpy(own, temper_of(job, tile[0]), sizeof(own))
    for j in range(LANES):
        units_of_row(<real>r.maximum[j], r.own[j], own, &pivot[j], &magic[j], &highest[j])
        lowest[j] = lowest_of(magic[j], own)
        m[j] = <real>-INFINITY
    memset(others, 0, half * LANES * sizeof(real))
    memset(top, 0, half * LANES * sizeof(real))
    for c in range(<int32_t>job.num_classes):
        fetch(later + c * later_step, LANES * size)
        part = part_of(job, c, half) * LANES
        for j in range(LANES):
            line[j] = exponential(
                below(tile[c * step + j], highest[j]), pivot[j], magic[j], lowest[j], own)
        for j in range(LANES):
            m[j] = above(tile[c * step + j], m[j])
        for j in range(LANES):
            others[part + j] += below(line[j], top[part + j])
        for j in range(LANES):
            top[part + j] = above(line[j], top[part + j])
    while half > 1:
        half //= 2
        for j in range(half * LANES):
            t = top[j + half * LANES]
            others[j] = (others[j] + others[j + half * LANES]) + below(t, top[j])
            top[j] = above(t, top[j])
    for j in range(LANES):
        r.maximum[j] = m[j]
        r.others[j] = others[j]
        r.top[j] = r.target_exp[j] = top[j]


cdef void log_softmax_tile(
    const Job* job, Operation operation, Py_ssize_t first, real* tile, int32_t* untamed,
    real* buffer,
) noexcept nogil:
    """As log_softmax_rows."""
    cdef Rows r
    cdef real maximum[LANES]
    cdef real log_sum[LANES]
    cdef int32_t own[LANES]
    cdef int32_t left = 0, found = 0
    cdef Py_ssize_t c, j, step = job.step
    find_hopeless(job, tile, own, &r, untamed)
    for j in range(LANES):
        r.row_weight[j] = r.target_weight[j] = 1.0
    top_of_tile(job, first, tile, &r)
    find_untamed(job, &r, LANES, 1.0, tile[0])
    for j in range(LANES):
        left |= r.own[j] & (own[j] ^ 1)
        r.own[j] |= own[j]
        found |= r.own[j]
    untamed[0] = found
    if left:
        top_of_tile(job, first, tile, &r)
    for j in range(LANES):
        r.log_sum[j] = log1p(r.others[j] / r.top[j])
    if operation == LOGSUMEXP:
        for j in range(LANES):
            if not is_finite(r.maximum[j]) and not holds_nan(tile + j, step, job.num_classes):
                r.log_sum[j] = 0.0
        for j in range(LANES):
            buffer[j] = <real>(r.maximum[j] + r.log_sum[j])
        store(job, first, min(job.rows - first, <Py_ssize_t>LANES), buffer)
        return
    for j in range(LANES):
        maximum[j] = <real>r.maximum[j]
        log_sum[j] = <real>r.log_sum[j]
    for c in range(job.num_classes):
        for j in range(LANES):
            tile[c * step + j] = (tile[c * step + j] - maximum[j]) - log_sum[j]


cdef void loss_tile(
    const Job* job, Operation operation, Py_ssize_t first, real* tile, real* other,
    int32_t* untamed,
) noexcept nogil:
    cdef Rows r
    cdef int32_t index[LANES]
    cdef Py_ssize_t n = min(job.rows - first, <Py_ssize_t>LANES)
    reduce_tile(job, operation, first, n, &r, index, tile, other, untamed)
    scalar_step(job, operation, &r, LANES, tile[0])
    job.partial[first // LANES] = deliver_losses(job, first, n, r.loss)
    if job.out == NULL:
        return
    write_tile(job, &r, index, tile if has_soft_target(operation) else other, tile,
               other if has_soft_target(operation) else NULL)


cdef inline void reduce_tile(
    const Job* job, Operation operation, Py_ssize_t first, Py_ssize_t n, Rows* r, int32_t* index,
    real* tile, real* other, int32_t* untamed,
) noexcept nogil:
    """As reduce_rows. Exponentials go into `other`; in units of the rows' own, as soft targets want
    them, which lie there, they take the place of the scores."""
    cdef int64_t y[LANES]
    cdef real maximum[LANES]
    cdef Py_ssize_t j
    for j in range(n, LANES):
        y[j] = 0
        r.row_weight[j] = r.target_weight[j] = 0.0
    if has_soft_target(operation):
        read_sample_weights(job, first, n, r)
        clear_dead_lanes(job, r, other)
        clear_dead_lanes(job, r, tile)
        largest_in_lanes(job, tile, maximum)
        find_in_lanes(job, tile, maximum, index)
        soft_gaps_of_tile(job, tile, other, maximum, index, r)
        take_target_logits(job, tile, index, r)
        exp_tile_from_maximum(job, first, tile, maximum, index, tile, r)
    else:
        read_targets(job, first, n, y, r)
        for j in range(LANES):
            index[j] = <int32_t>y[j]
        clear_dead_lanes(job, r, tile)
        exp_tile_from_target(job, first, tile, index, other, r, untamed)
    if is_smooth(job):
        gaps_of_tile(job, tile, r)


cdef inline void take_target_logits(
    const Job* job, const real* tile, const int32_t* index, Rows* r
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(LANES):
        r.target_logit[j] = tile[index[j] * job.step + j]


cdef inline void exp_tile_from_maximum(
    const Job* job, Py_ssize_t first, real* tile, const real* maximum, const int32_t* index,
    real* e, Rows* r,
) noexcept nogil:
    """exp_tile in units of each row, and what add_exponentials says."""
    cdef Py_ssize_t j
    for j in range(LANES):
        r.maximum[j] = maximum[j]
        r.own[j] = 1
    exp_tile(job, first, tile, index, e, False, r)
    add_exponentials(job, r, 0, LANES, tile[0])


cdef inline void exp_tile_from_target(
    const Job* job, Py_ssize_t first, real* tile, const int32_t* index, real* e, Rows* r,
    int32_t* last,
) noexcept nogil:
    """exp_tile_untamed, with the target as what others are related to, where that does."""
    cdef bint untamed = exp_tile_untamed(job, first, tile, index, job.tame_scale, e, r, last)
    cdef Py_ssize_t j
    if untamed or job.options.label_smoothing != 0.0 or job.options.z_loss != 0.0:
        take_target_logits(job, tile, index, r)
    else:
        for j in range(LANES):
            r.target_logit[j] = 0.0
    for j in range(LANES):
        r.gap[j] = 0.0
        r.maximum[j] = r.maximum[j] if r.own[j] else r.target_logit[j]
        r.top[j] = r.target_exp[j]
    if untamed:
        take_tops(job, r, tile[0])


cdef inline void take_tops(const Job* job, Rows* r, real unused) noexcept nogil:
    """The exponentials of the maxima, of lanes with units of their own."""
    cdef const real* temper = temper_of(job, unused)
    cdef real m, magic
    cdef Py_ssize_t j
    for j in range(LANES):
        if r.own[j]:
            m = <real>r.maximum[j]
            magic = magic_of(m, temper)
            r.top[j] = exponential(
                m, pivot_of(m, temper), magic, lowest_of(magic, temper), temper)


cdef inline void gaps_of_tile(const Job* job, const real* tile, Rows* r) noexcept nogil:
    """As gaps_of_rows."""
    cdef real parts[CHUNK * LANES]
    cdef real m[LANES]
    cdef real w
    cdef int32_t c, part, among = parts_of(job)
    cdef Py_ssize_t step = job.step, j
    memset(parts, 0, among * LANES * sizeof(real))
    for j in range(LANES):
        m[j] = <real>r.maximum[j]
    for c in range(<int32_t>job.num_classes):
        w = weight_of(job, c, parts[0])
        part = part_of(job, c, among) * LANES
        for j in range(LANES if w != 0 else 0):
            parts[part + j] += w * (m[j] - tile[c * step + j])
    fold_row_parts(job, parts, among, r.gap)
    for j in range(LANES):
        if not is_finite(r.gap[j]):
            r.gap[j] = wide_gap(tile + j, step, <const real*>job.relative_weight, job.num_classes,
                                m[j])
        r.gap[j] *= job.largest_weight


cdef inline void soft_gaps_of_tile(
    const Job* job, const real* tile, const real* targets, const real* maximum,
    const int32_t* index, Rows* r,
) noexcept nogil:
    """As gaps_of_block, for every lane."""
    cdef real gap[LANES]
    cdef real mass[LANES]
    cdef real m[LANES]
    cdef double total_gap[LANES]
    cdef double total_mass[LANES]
    cdef int32_t hole[LANES]
    cdef real target_share = <real>(1.0 - job.options.label_smoothing)
    cdef real uniform = <real>(job.options.label_smoothing / job.num_classes)
    cdef real w, wt
    cdef int32_t c
    cdef int bad = 0
    cdef Py_ssize_t step = job.step, j
    for j in range(LANES):
        gap[j] = mass[j] = 0
        total_gap[j] = total_mass[j] = 0.0
        m[j] = maximum[j]
        hole[j] = index[j]
    for c in range(<int32_t>job.num_classes):
        w = weight_of(job, c, maximum[0])
        for j in range(LANES):
            wt = w * (target_share * targets[c * step + j] + uniform)
            gap[j] += times(wt, m[j] - tile[c * step + j])
            mass[j] += <real>0.0 if hole[j] == c else wt
        if c % RUN == RUN - 1:
            for j in range(LANES):
                total_gap[j] += gap[j]
                total_mass[j] += mass[j]
                gap[j] = mass[j] = 0
    for j in range(LANES):
        total_gap[j] += gap[j]
        total_mass[j] += mass[j]
        bad |= not is_finite(total_gap[j])
    if bad:  # in float64 where it leaves the range of x
        for j in range(LANES):
            if is_finite(total_gap[j]):
                continue
            total_gap[j] = 0.0
            for c in range(<int32_t>job.num_classes):
                wt = weight_of(job, c, maximum[0]) * (
                    target_share * targets[c * step + j] + uniform)
                total_gap[j] += times(<double>wt, <double>m[j] - <double>tile[c * step + j])
    for j in range(LANES):
        r.gap[j] = job.largest_weight * total_gap[j]
        wt = weight_of(job, index[j], maximum[0]) * (
            target_share * targets[index[j] * step + j] + uniform)
        r.top_mass[j] = job.largest_weight * wt
        r.mass[j] = job.largest_weight * total_mass[j]


cdef inline void write_tile(
    const Job* job, const Rows* r, const int32_t* index, real* e, real* tile, const real* targets
) noexcept nogil:
    """From exponentials to the gradient: factor * e_c - spread * w_c t_c, and left_out at index."""
    cdef real f[LANES]
    cdef real left_out[LANES]
    cdef real on_target[LANES]
    cdef real on_all[LANES]
    cdef int32_t hole[LANES]
    cdef double target_share = 1.0 - job.options.label_smoothing
    cdef double uniform = job.options.label_smoothing / job.num_classes, spread
    cdef real w
    cdef int32_t c
    cdef Py_ssize_t step = job.step, j
    narrow_factors(job, e, r, f)
    for j in range(LANES):
        spread = r.spread[j] * job.largest_weight
        on_target[j] = <real>(spread * target_share)
        on_all[j] = <real>(spread if targets == NULL else spread * uniform)
        left_out[j] = <real>r.left_out[j]
        hole[j] = index[j]
    for c in range(<int32_t>job.num_classes):
        w = weight_of(job, c, left_out[0])
        if targets != NULL:
            for j in range(LANES):
                tile[c * step + j] = e[c * step + j] * f[j] - w * (
                    on_target[j] * targets[c * step + j] + on_all[j])
        elif job.options.label_smoothing != 0.0:
            for j in range(LANES):
                tile[c * step + j] = e[c * step + j] * f[j] - w * on_all[j]
        else:
            for j in range(LANES):
                tile[c * step + j] = e[c * step + j] * f[j]
        # In passing: numbers put one by one into the tile would hold up who then reads vectors.
        for j in range(LANES):
            tile[c * step + j] = left_out[j] if hole[j] == c else tile[c * step + j]


cdef void tile_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    cdef real* tile = tile_of(job, scratch)
    cdef real* other = other_tile_of(job, scratch)
    cdef int32_t* untamed = untamed_of(job, scratch)
    cdef Py_ssize_t i, lane, first = unit * job.group
    load_tiles(job, job.storage, job.logits, unit, tile, scratch)
    if job.other != NULL:
        load_tiles(job, job.other_storage, job.other, unit, other, scratch)
    for i in range((rows_in_unit(job, unit) + LANES - 1) // LANES):
        lane = i * LANES
        if operation == SOFTMAX:
            softmax_tile(job, first + lane, tile + lane, other + lane, untamed)
        elif is_log(operation):
            log_softmax_tile(job, operation, first + lane, tile + lane, untamed, scratch)
        elif is_backward(operation):
            backward_tile(job, operation, tile + lane, other + lane)
        elif operation == ENTROPY:
            entropy_tile(job, first + lane, tile + lane, other + lane)
        else:
            loss_tile(job, operation, first + lane, tile + lane, other + lane, untamed)
    if job.out != NULL and writes_rows(operation):
        store_tiles(job, unit, tile, scratch)


cdef inline void short_unit(
    const Job* job, Operation operation, Py_ssize_t unit, real* scratch
) noexcept nogil:
    """Short rows as one run, or, where some need units of their own, as a tile."""
    cdef int32_t* untamed = untamed_of(job, scratch)
    cdef bint done = False
    if not untamed[0]:
        if operation == SOFTMAX:
            done = softmax_rows(job, unit, scratch)
        elif is_log(operation):
            done = log_softmax_rows(job, operation, unit, scratch)
        elif is_backward(operation):
            done = backward_run(job, operation, unit, scratch)
        else:
            done = loss_rows(job, operation, unit, scratch)
    if not done:
        tile_unit(job, operation, unit, scratch)
