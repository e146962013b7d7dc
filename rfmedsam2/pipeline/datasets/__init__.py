"""Raw datasets: conversion of official downloads, synthetic data, verification, splits, submissions."""
