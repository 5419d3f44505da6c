"""Writes two small NIfTI-1 files with nibabel, for tests/nifti_test.cpp to read; with --show FILE prints what nibabel
reads from a file that Capo wrote.

usage: make_nifti.py [--show FILE...]

nibabel_scaled.nii.gz  i16 little-endian with a slope, an oblique qform and another sform
nibabel_plain.nii      u16 big-endian, no qform, an sform

Made with nibabel 5.4.2, numpy 2.4.6. Stored at (x, y, z): 40 x - 3 y + 7 z - 20 (scaled: a voxel is half of it, less 20)
and 1000 x + 100 y + 10 z (plain).
"""
import gzip, os, sys

import nibabel
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


def grid(nx, ny, nz):
    return np.meshgrid(np.arange(nx), np.arange(ny), np.arange(nz), indexing='ij')


def save(image, name):
    raw = image.to_bytes()
    with open(os.path.join(HERE, name), 'wb') as f:
        f.write(gzip.compress(raw, mtime=0) if name.endswith('.gz') else raw)
    print(name, image.shape, image.get_data_dtype(), '\n', image.affine)


def main():
    if sys.argv[1:2] == ['--show']:
        for path in sys.argv[2:]:
            image = nibabel.load(path)
            data = image.get_fdata()
            print(path, image.shape, image.get_data_dtype(), 'sum %.9g' % data.sum(), 'first', data.ravel(order='F')[:4])
            print('qform', image.header.get_qform(coded=True), 'sform', image.header.get_sform(coded=True))
        return
    x, y, z = grid(5, 4, 3)
    # 30 degrees about the head-foot axis, x turned over; spacing 1.5, 2, 2.5
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    turn = np.array([[-c, -s, 0], [-s, c, 0], [0, 0, 1]]) @ np.diag([1.5, 2, 2.5])
    oblique = np.eye(4)
    oblique[:3, :3], oblique[:3, 3] = turn, [10, -20, 30]
    image = nibabel.Nifti1Image((40 * x - 3 * y + 7 * z - 20).astype(np.int16), None)
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, -20)
    image.set_qform(oblique, code=1)
    image.set_sform(np.diag([2, 2, 2, 1.0]) @ oblique, code=4)
    image.header.set_xyzt_units('mm', 'sec')
    save(image, 'nibabel_scaled.nii.gz')
    header = nibabel.Nifti1Header(endianness='>')
    header.set_data_dtype(np.uint16)
    x, y, z = grid(3, 2, 4)
    plain = np.array([[1, 0, 0, -1], [0, 2, 0, -2], [0, 0, 3, -3], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image((1000 * x + 100 * y + 10 * z).astype(np.uint16), None, header)
    image.set_sform(plain, code=2)
    image.header.set_xyzt_units('micron')
    save(image, 'nibabel_plain.nii')


main()
